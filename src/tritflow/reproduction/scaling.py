"""What a ternary student keeps against the model's size and the steps of its distillation, stage by stage.

DIR/SIZE/teacher           a pipeline folder
DIR/SIZE/student-STEPS     a ternary folder
DIR/SIZE/pictures          both models' pictures and verdicts
DIR/SIZE/run-STEPS.json    what came out; a finished one is not made again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tritflow.calibration.artifacts import read_json, write_json
from tritflow.config import Recipe
from tritflow.evaluation.api import get_task
from tritflow.evaluation.contenders import contender, trained_prompts
from tritflow.evaluation.run import Sampling, evaluate
from tritflow.pipelines.quantize import quantize
from tritflow.results import provenance
from tritflow.training.models import SmallFluxSize
from tritflow.training.sized import train_sized


def scale(
    sizes: Mapping[str, SmallFluxSize],
    steps: Sequence[int],
    out: Path,
    *,
    recipe: str | Recipe = "best",
    seconds: float,
    per_tag: int,
    prompts: str = "scenes:49152",
    device: str = "cpu",
    mode: str | None = None,
    seed: int = 0,
    settings: Sequence[str] = (),
    teacher: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[dict[str, Any]]:
    """Train teachers, distil each at several lengths, score; yields a run each, those of earlier calls too.

    Args:
        sizes: transformers by name.
        steps: of distillation, each from the teacher.
        out: keeps every stage; the same call goes on after a kill.
        recipe: of the students; its steps are overridden.
        seconds: of training a teacher.
        per_tag: held-out prompts a tag, a picture each.
        prompts: that students are distilled on.
        device: of everything.
        mode: of the students (None: the recipe's).
        seed: of teachers, students and noise.
        settings: further changes of the recipe.
        teacher: further arguments of `train_sized`.
        say: takes a line about each stage.
    """
    for name, size in sizes.items():
        folder = out / name
        meta: dict[str, Any] | None = None
        for count in steps:
            path = folder / f"run-{count}.json"
            if not path.is_file():
                if meta is None:
                    say(f"{name}: teacher")
                    meta = train_sized(
                        size, folder / "teacher", seconds=seconds, seed=seed, device=device, log=say, **(teacher or {})
                    )
                say(f"{name}: student of {count} steps")
                write_json(
                    path, _student(folder, name, count, meta, recipe, per_tag, prompts, device, mode, seed, settings)
                )
            yield read_json(path)


def _student(
    folder: Path,
    name: str,
    count: int,
    meta: Mapping[str, Any],
    recipe: str | Recipe,
    per_tag: int,
    prompts: str,
    device: str,
    mode: str | None,
    seed: int,
    settings: Sequence[str],
) -> dict[str, Any]:
    teacher, student = folder / "teacher", folder / f"student-{count}"
    report = quantize(
        teacher, student, recipe, mode=mode, prompts=prompts, device=device, seed=seed,
        settings=[*settings, f"distillation.steps={count}"],
    )  # fmt: skip
    task = get_task("scenes")
    records = task.prompts(task.splits[0], per_tag=per_tag)
    run = evaluate(
        task,
        records,
        contender(str(student), device=device),
        folder / "pictures",
        teacher=contender(str(teacher), device=device),
        sampling=Sampling(1, seed, 64),
        label=f"{name}, {count:,} steps",
        trained_on=trained_prompts(str(student)),
    )
    return {
        "label": run["label"],
        "size": name,
        "parameters": meta["parameters"],
        "teacher_steps": meta.get("steps"),
        "teacher_seconds": meta["seconds"],
        "steps": count,
        "retreats": len(report.retreats),
        "validation_mse": report.validation[max(report.validation)],
        "task": run["task"],
        "prompts": run["prompts"],
        "scores": {"overall": run["scores"]["overall"]},
        "against": {"scores": {"overall": run["against"]["scores"]["overall"]}},
        "paired": {"overall": run["paired"]["overall"]},
        "psnr": run["fidelity"]["psnr"],
        "psnr_object": run["fidelity"]["psnr_object"],
        **provenance(device),
    }
