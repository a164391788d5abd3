"""What a suite is: prompts with stable ids, where its pictures lie, and a verdict on each picture.

A task never draws and never opens a model. Pictures come from an `ImageSet` (`images.py`), which any
`draw(prompts, seeds)` can fill, so GenEval, T2I-CompBench and the built-in scenes share everything but this
interface: prompts, folder layout, score.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritflow.config import nearest
from tritflow.results import digest

if TYPE_CHECKING:
    from PIL.Image import Image

    from tritflow.evaluation.images import ImageSet
    from tritflow.evaluation.ledger import Ledger
    from tritflow.evaluation.tasks.detail import Detail

Draw = Callable[[list[str], list[int]], "list[Image]"]
"""`draw(prompts, seeds)`: one picture for each (prompt, seed), the same whatever else is in the batch."""

Progress = Callable[[int, int], None]
"""`progress(done, total)` in pictures."""


class EvaluationError(ValueError):
    """A suite, its prompts or its pictures are not what was asked for; the message says how to mend it."""


@dataclass(frozen=True)
class PromptRecord:
    """One prompt of a suite.

    Attributes:
        id: stable name, unique in the suite; decides the seeds, so it must not depend on what else is drawn.
        tag: the category it is scored under.
        text: what the model reads.
        metadata: plain JSON that the scorer needs (clauses, categories).
    """

    id: str
    tag: str
    text: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Judgement:
    """A scorer's verdict on one picture.

    Attributes:
        prompt_id: of the prompt.
        tag: of the prompt.
        sample: which picture of the prompt.
        seed: the picture was drawn from.
        score: 0 or 1 for yes/no suites, a number in [0, 1] for graded ones.
        reason: why, in words; empty when it passed.
        marked: share of the ground that does not look like the rest of it, where a suite knows what is ground.
    """

    prompt_id: str
    tag: str
    sample: int
    seed: int
    score: float
    reason: str = ""
    marked: float | None = None

    @property
    def passed(self) -> bool:
        return self.score >= 0.5


@dataclass(frozen=True)
class TaskOptions:
    """What a user may choose about a suite.

    Attributes:
        prompts: folder with the suite's own prompt files; None: where `tritflow prompts fetch` puts them.
        scorers: folder or hub id by role, instead of the suite's default.
        device: where scorers run.
        batch_size: pictures that scorers look at together.
    """

    prompts: Path | None = None
    scorers: Mapping[str, str] = field(default_factory=dict)
    device: str = "cpu"
    batch_size: int = 8


NO_OPTIONS = TaskOptions()


class Task(ABC):
    """A suite of prompts with a scorer.

    Class attributes:
        name: as on the command line.
        version: raised whenever prompts, layout or scores change meaning; written into every result.
        tags: categories in the order of the tables.
        overall_tags: those whose means are averaged into the overall score.
        graded: whether scores are graded (False: yes/no).
        scorers: what scores, by role; of a suite with models that score, known once `score` has run.
        roles: of the models that score, each of which `TaskOptions.scorers` may replace.
        substitutes: by role, what the suite's authors ran where this scores with something else. Scores with
            substitutes are not the suite's official metric, and nothing may print them as such.
        splits: of its prompts; the first is the default.
        default_samples: pictures a prompt unless asked otherwise.

    Raises `EvaluationError` for options that the suite has no use for.
    """

    name: str
    version: int = 1
    tags: tuple[str, ...]
    overall_tags: tuple[str, ...]
    graded: bool = False
    scorers: dict[str, str] = {}  # noqa: RUF012  (a constant of the class, never written to)
    roles: tuple[str, ...] = ()
    substitutes: Mapping[str, str] = {}
    splits: tuple[str, ...] = ("test",)
    default_samples: int = 4

    def __init__(self, options: TaskOptions = NO_OPTIONS) -> None:
        for role in options.scorers:
            if role not in self.roles:
                has = f"it has {', '.join(self.roles)}" if self.roles else "it has none to choose"
                raise EvaluationError(f"{self.name} has no scorer '{role}'{nearest(role, list(self.roles))} ({has})")
        self.options = options

    @abstractmethod
    def prompts(
        self, split: str = "test", per_tag: int | None = None, seed: int = 0, tags: Sequence[str] | None = None
    ) -> list[PromptRecord]:
        """The suite's prompts, grouped by tag, in a fixed order. `per_tag` None takes the suite's own number.

        Raises `EvaluationError` for an unknown split or tag.
        """

    def sources(self, split: str) -> dict[str, str]:
        """Where the prompts of a split come from: "project@commit/path" to SHA-256; empty when they are made here."""
        return {}

    @abstractmethod
    def score(
        self, images: ImageSet, progress: Progress | None = None, ledger: Ledger | None = None
    ) -> list[Judgement]:
        """One judgement a picture, in the set's order.

        Pictures whose verdicts are in `ledger` are not scored again, and new verdicts go there as they come; a suite
        whose scoring costs next to nothing may leave it alone.
        """

    def chosen_scorers(self) -> dict[str, str]:
        """What will score, by role, as far as it was chosen: names and hashes that are known before anything loads."""
        from tritflow.evaluation.scorers.weights import identity

        return {role: identity(source) for role, source in self.options.scorers.items()}

    def read_official(self, images: ImageSet) -> list[Judgement]:
        """What the suite's own scorer, run out of process, has left in or beside the picture folder.

        Raises `EvaluationError` when it has left nothing, or not a score for each picture.
        """
        raise EvaluationError(f"{self.name} has no official scorer; leave out --official")

    def picture_path(self, record: PromptRecord, index: int, sample: int) -> str:
        """Where picture `sample` of the `index`-th prompt lies inside the folder (forward slashes).

        Suites with official scorers override it with the layout that those read.
        """
        return f"images/{record.id}/{sample:04d}.png"

    def sidecars(self, records: Sequence[PromptRecord]) -> dict[str, bytes]:
        """Further files that the suite's own scorer wants beside the pictures, by path."""
        return {}

    def object_mask(self) -> Callable[[Any], Any] | None:
        """What finds object pixels (bool [H, W]) in a uint8 [H, W, 3] picture of the suite; None: nothing does."""
        return None

    def details(self) -> tuple[Detail, ...]:
        """Measures of fine detail in single pictures, which `fidelity` sets beside the teacher's pictures'."""
        from tritflow.evaluation.tasks.detail import EDGE_SHARPNESS

        return (EDGE_SHARPNESS,)

    def check_tags(self, tags: Sequence[str] | None) -> tuple[str, ...]:
        """`tags`, or all of them; raises `EvaluationError` for one that the suite does not have."""
        for tag in tags or ():
            if tag not in self.tags:
                raise EvaluationError(
                    f"{self.name} has no tag '{tag}'{nearest(tag, list(self.tags))} (it has {', '.join(self.tags)})"
                )
        return tuple(tags) if tags else self.tags


TASKS: dict[str, str] = {
    "scenes": "tritflow.evaluation.tasks.scenes:ScenesTask",
    "geneval": "tritflow.evaluation.tasks.geneval:GenEvalTask",
    "t2i-compbench": "tritflow.evaluation.tasks.t2i_compbench:CompBenchTask",
}
"""Suites by name, imported when asked for."""


def get_task(name: str, options: TaskOptions = NO_OPTIONS) -> Task:
    """The suite called `name`. Raises `EvaluationError` with the nearest name when there is none."""
    if name not in TASKS:
        raise EvaluationError(f"there is no suite '{name}'{nearest(name, list(TASKS))} (available: {', '.join(TASKS)})")
    module, _, attribute = TASKS[name].partition(":")
    task: Task = getattr(importlib.import_module(module), attribute)(options)
    return task


def prompts_hash(records: Sequence[PromptRecord]) -> str:
    """Name of this very list of prompts: ids, texts, tags, metadata and order."""
    return digest([r.to_dict() for r in records])


def limited(records: Sequence[PromptRecord], number: int) -> list[PromptRecord]:
    """`number` of the prompts, the tags in turn, in the suite's order: a dry run that touches every tag.

    Raises `EvaluationError` for fewer than one.
    """
    if number < 1:
        raise EvaluationError(f"--limit {number} leaves no prompt to draw; take at least 1")
    places: dict[str, int] = {}
    turns = []
    for i, r in enumerate(records):
        places[r.tag] = places.get(r.tag, -1) + 1
        turns.append((places[r.tag], i))
    return [records[i] for i in sorted(i for _, i in sorted(turns)[:number])]


def overlap(records: Iterable[PromptRecord], trained_on: Iterable[str]) -> set[str]:
    """Ids of the prompts whose text was trained on, compared as `calibration.prompts.normalise` does."""
    from tritflow.calibration.prompts import normalise

    seen = {normalise(text) for text in trained_on}
    return {r.id for r in records if normalise(r.text) in seen}
