"""A whole evaluation: draw what is missing, score, compare with a teacher, and one JSON run out of it.

Nothing here knows a suite or a model: a suite is a `Task`, a model is a name, a hash and something that returns
`draw(prompts, seeds)`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritflow.evaluation import statistics as st
from tritflow.evaluation.api import Draw, EvaluationError, Judgement, PromptRecord, Task, overlap, prompts_hash
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ImageSetError, ModelId, Settings, read_lines
from tritflow.evaluation.tasks import fidelity
from tritflow.results import canonical, provenance, slug, write_atomically

Stage = Callable[[str, int, int], None]
"""`stage(name, done, total)`: progress of "drawing NAME", "scoring NAME", ... in pictures."""


@dataclass(frozen=True)
class Contender:
    """A model that is evaluated.

    Attributes:
        model: its name and hash.
        settings: how it draws.
        load: returns its `draw`; called only when pictures are missing.
        device: where it draws.
        facts: measures what else is to be told of it (bits a weight of a rival), plain JSON; None: nothing.
    """

    model: ModelId
    settings: Settings
    load: Callable[[], Draw]
    device: str = "cpu"
    facts: Callable[[], dict[str, Any]] | None = None

    @property
    def folder_name(self) -> str:
        """Name of its picture folder: model, hash, and mode where there is one."""
        mode = self.settings.extra.get("mode")
        words = [Path(self.model.name).name or "model", self.model.hash[:8], *([str(mode)] if mode else [])]
        return slug(" ".join(words))


@dataclass(frozen=True)
class Sampling:
    """Which pictures: `samples` a prompt, seeds from `base_seed`, drawn `batch_size` at once."""

    samples: int = 4
    base_seed: int = 0
    batch_size: int = 16


def summarise(task: Task, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """Per-tag and overall scores with 95 % intervals, and the noise of the seeds, as plain JSON.

    `overall` is null when a tag that it averages was not drawn: a mean over fewer tags is another number.
    """
    by_tag = {t: [j for j in judgements if j.tag == t] for t in task.tags}
    interval = st.clustered_mean if task.graded else st.clustered_proportion
    tags = {
        tag: interval([j.score for j in found], [j.prompt_id for j in found]).to_dict()
        for tag, found in by_tag.items()
        if found
    }
    counted = _counted(task, judgements)
    overall, noise = None, float("nan")
    if counted:
        scores, prompts, strata = _columns(counted)
        mean = st.clustered_mean if task.graded else st.stratified_proportion
        overall = mean(scores, prompts, strata).to_dict()
        noise = st.seed_noise(scores, prompts, strata)
    return {"overall": overall, "tags": tags, "seed_noise": _number(noise)}


def compare(task: Task, student: Sequence[Judgement], teacher: Sequence[Judgement]) -> dict[str, Any]:
    """Paired differences student - teacher, the share of the score kept, exact McNemar counts and the smallest
    difference the run could have seen, per tag and overall, as plain JSON.

    Raises `EvaluationError` when the two were not judged on the same pictures' seeds.
    """
    theirs = {(j.prompt_id, j.sample): j for j in teacher}
    if len(theirs) != len(student) or any(
        (j.prompt_id, j.sample) not in theirs or theirs[j.prompt_id, j.sample].seed != j.seed for j in student
    ):
        raise EvaluationError("the two models were not judged on the same prompts and seeds; draw both alike")
    matched = [theirs[j.prompt_id, j.sample] for j in student]

    def block(indices: Sequence[int], stratified: bool) -> dict[str, Any]:
        a, prompts, strata = _columns([student[i] for i in indices])
        b = [matched[i].score for i in indices]
        tags = strata if stratified else None
        found: dict[str, Any] = {
            "difference": st.paired_difference(a, b, prompts, tags).to_dict(),
            "kept": st.score_kept(a, b, prompts, tags).to_dict(),
            "minimum_detectable": _number(
                st.minimum_detectable_difference([x - y for x, y in zip(a, b, strict=True)], prompts, tags)
            ),
        }
        if not task.graded:
            found["mcnemar"] = asdict(st.mcnemar([x >= 0.5 for x in a], [y >= 0.5 for y in b]))
        return found

    counted = {id(j) for j in _counted(task, student)}
    inside = [i for i, j in enumerate(student) if id(j) in counted]
    return {
        "overall": block(inside, True) if inside else None,
        "tags": {
            tag: block([i for i, j in enumerate(student) if j.tag == tag], False)
            for tag in task.tags
            if any(j.tag == tag for j in student)
        },
    }


def evaluate(
    task: Task,
    records: Sequence[PromptRecord],
    student: Contender,
    out: str | Path,
    *,
    teacher: Contender | None = None,
    sampling: Sampling = Sampling(),
    label: str | None = None,
    trained_on: Iterable[str] | None = None,
    mask: fidelity.Mask | None = None,
    stage: Stage | None = None,
) -> dict[str, Any]:
    """Run a suite on one model, or on two from the same noise, inside the folder `out`; resumable.

    Leaves in `out` a picture folder a model, `NAME.scores.jsonl` with every verdict, and with a teacher
    `NAME.fidelity.jsonl`.

    Args:
        teacher: whom the student is compared with, picture by picture.
        label: name of the run in tables; the model's name by default.
        trained_on: prompts the student was trained on; None when that is not known, which the run then says.
        mask: finds object pixels in a teacher's picture, for `fidelity`.

    Returns the run: plain JSON for `results.append`.
    """
    out = Path(out)
    origin = provenance(student.device)
    versions = {k: v for k, v in origin["versions"].items() if k in ("torch", "diffusers", "pillow")}
    seconds: dict[str, float] = {}

    def ready(who: Contender) -> ImageSet:
        started = time.perf_counter()
        images = draw_images(
            out / who.folder_name,
            task,
            records,
            who.load,
            who.model,
            who.settings,
            samples=sampling.samples,
            base_seed=sampling.base_seed,
            batch_size=sampling.batch_size,
            device=origin["device"],
            versions=versions,
            lazy=True,
            progress=(lambda d, n: stage(f"drawing {who.model.name}", d, n)) if stage else None,
        )
        if images is None:
            raise ImageSetError(f"{out / who.folder_name}: other processes still draw into this folder")
        seconds["drawing"] = seconds.get("drawing", 0.0) + time.perf_counter() - started
        return images

    def judged(who: Contender, images: ImageSet) -> list[Judgement]:
        started = time.perf_counter()
        report = (lambda d, n: stage(f"scoring {who.model.name}", d, n)) if stage else None
        judgements = task.score(images, report)
        seconds["scoring"] = seconds.get("scoring", 0.0) + time.perf_counter() - started
        _write_lines(out / f"{who.folder_name}.scores.jsonl", [asdict(j) for j in judgements])
        return judgements

    sets = {who.folder_name: ready(who) for who in ([student] if teacher is None else [teacher, student])}
    mine = sets[student.folder_name]
    judgements = judged(student, mine)
    seen = overlap(records, trained_on) if trained_on is not None else set()
    run: dict[str, Any] = {
        "label": label or student.model.name,
        "task": {"name": task.name, "version": task.version, "scorers": dict(task.scorers)},
        "model": asdict(student.model),
        "settings": asdict(student.settings),
        "prompts": {
            "count": len(records),
            "hash": prompts_hash(records),
            "tags": {t: sum(r.tag == t for r in records) for t in task.tags if any(r.tag == t for r in records)},
            "pictures": len(mine.entries),
            "samples": sampling.samples,
            "base_seed": sampling.base_seed,
            "overlap": {"known": trained_on is not None, "count": len(seen), "ids": sorted(seen)},
        },
        "pictures": {"folder": student.folder_name, "hash": mine.hash},
        "scores": summarise(task, judgements),
    }
    if student.facts is not None:
        run["rival"] = student.facts()
    unseen = [j for j in judgements if j.prompt_id not in seen]
    if seen:
        run["scores_without_overlap"] = summarise(task, unseen) if unseen else None
    if teacher is not None:
        theirs = sets[teacher.folder_name]
        baseline = judgements if teacher.folder_name == student.folder_name else judged(teacher, theirs)
        run["against"] = {
            "model": asdict(teacher.model),
            "settings": asdict(teacher.settings),
            "pictures": {"folder": teacher.folder_name, "hash": theirs.hash},
            "scores": summarise(task, baseline),
        }
        run["paired"] = compare(task, judgements, baseline)
        if seen and unseen:
            kept_baseline = [j for j in baseline if j.prompt_id not in seen]
            run["paired_without_overlap"] = compare(task, unseen, kept_baseline)
        started = time.perf_counter()
        report = (lambda d, n: stage("measuring fidelity", d, n)) if stage else None
        measured = fidelity.measure(mine, theirs, mask, report)
        seconds["fidelity"] = time.perf_counter() - started
        _write_lines(out / f"{student.folder_name}.fidelity.jsonl", [asdict(m) for m in measured])
        run["fidelity"] = fidelity.summary(measured)
    run["seconds"] = {k: round(v, 3) for k, v in seconds.items()}
    return {**run, **origin}


def read_judgements(path: str | Path) -> list[Judgement]:
    """Verdicts as `evaluate` left them in `NAME.scores.jsonl`."""
    return [Judgement(**line) for line in read_lines(Path(path))]


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(canonical(r) + "\n" for r in rows).encode())


def _counted(task: Task, judgements: Sequence[Judgement]) -> list[Judgement]:
    """Those of the overall score; none when one of its tags is missing."""
    if not set(task.overall_tags) <= {j.tag for j in judgements}:
        return []
    return [j for j in judgements if j.tag in task.overall_tags]


def _columns(judgements: Sequence[Judgement]) -> tuple[list[float], list[str], list[str]]:
    return [j.score for j in judgements], [j.prompt_id for j in judgements], [j.tag for j in judgements]


def _number(x: float) -> float | None:
    return round(x, 6) if x == x else None
