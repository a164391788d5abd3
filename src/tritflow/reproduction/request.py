"""What is to be reproduced: the model, how it becomes ternary, which suites, how many pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritflow.evaluation.api import PromptRecord, Task, TaskOptions, get_task, limited
from tritflow.evaluation.contenders import contender
from tritflow.evaluation.run import Contender, Sampling
from tritflow.reproduction.engine import ReproductionError
from tritflow.results import slug

PAPER_SUITES = ("geneval", "t2i-compbench")
PAPER_STEPS = 50
"""Sampler steps of the paper's latencies (arXiv 2412.18653, Table 3)."""
KERNEL_OFF = "reference"


@dataclass(frozen=True)
class Request:
    """All that a user chooses. None takes what the model folder or the suite says.

    Attributes:
        model: a dense pipeline folder, or `small`.
        out: the run's folder.
        recipe: of the quantization: a name or a .toml.
        suites: which are drawn and scored; none: the paper's two, and scenes for `small`.
        limit: prompts a suite, all tags in turn.
        samples: pictures a prompt.
        seed: of the noise.
        steps: of the sampler, everywhere.
        batch_size, scorer_batch: pictures drawn and scored at once.
        scorers: by suite and role, instead of the suite's defaults.
        prompts: folder with the suites' files; None: where `prompts fetch` puts them.
        calibration: prompts for the recipe, as `quantize --prompts` takes them.
        kernel_off: also draw and score without kernels, as the paper's tables do.
        rounds: pictures whose time is taken.
        device, dtype: see `pipelines.loading`.
    """

    model: str
    out: Path
    recipe: str = "large"
    suites: tuple[str, ...] = ()
    limit: int | None = None
    samples: int | None = None
    seed: int = 0
    steps: int | None = None
    batch_size: int = 16
    scorer_batch: int = 8
    scorers: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    prompts: Path | None = None
    calibration: str | None = None
    kernel_off: bool = True
    rounds: int = 5
    device: str | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        from tritflow.assets import ASSETS

        if self.model not in ASSETS and not (Path(self.model) / "model_index.json").is_file():
            raise ReproductionError(
                f"'{self.model}' is no pipeline folder (it has no model_index.json); give the folder of a dense FLUX, "
                "or small"
            )
        for suite in self.scorers:
            if suite not in self.chosen_suites:
                raise ReproductionError(
                    f"--scorer {suite}:... is of a suite that is not run (these are: {', '.join(self.chosen_suites)})"
                )

    @property
    def chosen_suites(self) -> tuple[str, ...]:
        return self.suites or (("scenes",) if self.model == "small" else PAPER_SUITES)

    @property
    def name(self) -> str:
        """The model's short name, for folders."""
        return slug(Path(self.model).resolve().name if Path(self.model).is_dir() else self.model)

    @property
    def student(self) -> Path:
        """The folder of the ternary model."""
        return self.out / f"{self.name}-1.58bit"

    @property
    def calibration_prompts(self) -> Path:
        return self.out / "prompts.jsonl"

    @property
    def results(self) -> Path:
        return self.out / "results"

    @property
    def latency_steps(self) -> int | None:
        """Of the timed pictures: the paper's number, unless the model is no FLUX of its kind."""
        return self.steps or (PAPER_STEPS if set(self.chosen_suites) & set(PAPER_SUITES) else None)

    def task(self, suite: str) -> Task:
        """A fresh task, without any scorer in memory. Raises `EvaluationError`."""
        return get_task(suite, TaskOptions(self.prompts, self.scorers.get(suite, {}), self.on, self.scorer_batch))

    @property
    def on(self) -> str:
        from tritflow.pipelines.loading import pick_device

        return str(pick_device(self.device))

    def records(self, task: Task) -> list[PromptRecord]:
        records = task.prompts(task.splits[0])
        return records if self.limit is None else limited(records, self.limit)

    def sampling(self, task: Task) -> Sampling:
        return Sampling(self.samples or task.default_samples, self.seed, self.batch_size)

    def pictures(self, task: Task) -> Path:
        """Folder of a suite's picture sets; another number of pictures has another folder."""
        count = len(self.records(task))
        return self.out / "pictures" / f"{task.name}-{count}x{self.sampling(task).samples}-seed{self.seed}"

    def teacher(self) -> Contender:
        return contender(self.model, device=self.device, dtype=self.dtype, num_inference_steps=self.steps)

    def drawn_by(self, who: str) -> Contender:
        """`teacher`, `student` or `kernel-off`, drawing as the teacher does. The ternary folder must be there."""
        teacher = self.teacher()
        if who == "teacher":
            return teacher
        same: dict[str, Any] = {
            key: getattr(teacher.settings, key) for key in ("height", "width", "num_inference_steps", "guidance_scale")
        }
        return contender(
            str(self.student),
            base=self.model,
            device=self.device,
            dtype=self.dtype,
            backend=KERNEL_OFF if who == "kernel-off" else None,
            **same,
        )

    @property
    def contenders(self) -> dict[str, str]:
        """Labels in tables, by who draws."""
        dense = "teacher" if self.chosen_suites == ("scenes",) else "FLUX"
        off = {"kernel-off": "1.58-bit, no kernel"} if self.kernel_off else {}
        return {"teacher": dense, **off, "student": "1.58-bit"}
