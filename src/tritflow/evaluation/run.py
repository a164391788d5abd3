"""A whole evaluation: draw what is missing, score, compare with a teacher, and one JSON run out of it.

Nothing here knows a suite or a model: a suite is a `Task`, a model is a name, a hash and something that returns
`draw(prompts, seeds)`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tritflow.evaluation.api import (
    Draw,
    EvaluationError,
    Judgement,
    Progress,
    PromptRecord,
    Task,
    overlap,
    prompts_hash,
)
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ModelId, Settings
from tritflow.evaluation.projection import Projection, project
from tritflow.evaluation.sharing import drop_parts, finished, score_shared, wait_for
from tritflow.evaluation.summaries import between_seed_sets, compare, summarise
from tritflow.evaluation.tasks import fidelity
from tritflow.results import canonical, provenance, slug, write_atomically

if TYPE_CHECKING:
    from tritflow.evaluation.scorers.lpips import Lpips

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
        facts: measures what else is to be told of a quantized model (method, bits a weight), plain JSON; None: dense.
        flags: which path it draws by, see `pipelines.flags`; asked when pictures are drawn. None: not known.
    """

    model: ModelId
    settings: Settings
    load: Callable[[], Draw]
    device: str = "cpu"
    facts: Callable[[], dict[str, Any]] | None = None
    flags: Callable[[], dict[str, Any]] | None = None

    @property
    def folder_name(self) -> str:
        """Name of its picture folder: model, hash, and mode, backend and the optimized forward where they are named."""
        chosen = [self.settings.extra.get(key) for key in ("mode", "backend")]
        chosen += ["optimized"] if self.settings.extra.get("optimized") else []
        words = [Path(self.model.name).name or "model", self.model.hash[:8], *(str(c) for c in chosen if c)]
        return slug(" ".join(words))


@dataclass(frozen=True)
class Sampling:
    """Which pictures: `samples` a prompt, seeds from `base_seed`, drawn `batch_size` at once."""

    samples: int = 4
    base_seed: int = 0
    batch_size: int = 16


@dataclass(frozen=True)
class Plan:
    """What `evaluate` does besides drawing and scoring, or leaves out.

    Attributes:
        noise_seed: base seed of a second set of the student's pictures, to measure what another seed set changes.
        official: take the verdicts that the suite's own scorer left with the pictures instead of scoring here.
        draw_only: stop when all pictures are there.
        fidelity: compare pictures with the teacher's.
        perceptual: for LPIPS.
        split: of the suite's prompts, for the record; the suite's first one by default.
        shard: (rank, number of processes); every rank draws and scores its share, and rank 0 does the rest.
        patience: seconds that a rank waits for the others without anything new.
    """

    noise_seed: int | None = None
    official: bool = False
    draw_only: bool = False
    fidelity: bool = True
    perceptual: Lpips | None = None
    split: str | None = None
    shard: tuple[int, int] = (0, 1)
    patience: float = 1800.0


PLAIN = Plan()


def projections(
    records: Sequence[PromptRecord],
    student: Contender,
    out: str | Path,
    *,
    teacher: Contender | None = None,
    sampling: Sampling = Sampling(),
    plan: Plan = PLAIN,
) -> list[Projection]:
    """What drawing will take, a set of pictures each; the arguments are those of `evaluate`."""
    device = provenance(student.device)["device"]
    return [
        project(Path(out) / name, who.model.name, len(records) * sampling.samples, who.settings, device=device)
        for name, who, _ in _picture_sets(student, teacher, sampling, plan)
    ]


def evaluate(
    task: Task,
    records: Sequence[PromptRecord],
    student: Contender,
    out: str | Path,
    *,
    teacher: Contender | None = None,
    sampling: Sampling = Sampling(),
    label: str | None = None,
    trained_on: Sequence[str] | None = None,
    stage: Stage | None = None,
    plan: Plan = PLAIN,
) -> dict[str, Any]:
    """Run a suite on one model, or on two from the same noise, inside the folder `out`; resumable.

    Leaves in `out` a picture folder a model, `NAME.scores.jsonl` with every verdict, and with a teacher
    `NAME.fidelity.jsonl`.

    Args:
        teacher: whom the student is compared with, picture by picture.
        label: name of the run in tables; the model's name by default.
        trained_on: prompts the student was trained on; None when that is not known, which the run then says.
        stage: hears of the progress.

    Returns the run: plain JSON for `results.append`; empty on ranks other than 0 and with `draw_only`.
    Raises `EvaluationError` when the disk has no room, and `ImageSetError` when other ranks stop drawing.
    """
    out = Path(out)
    for projection in projections(records, student, out, teacher=teacher, sampling=sampling, plan=plan):
        projection.check()
    drop_parts(out, plan.shard[0])
    origin = provenance(student.device)
    clock = _Clock(stage)
    wanted = _picture_sets(student, teacher, sampling, plan)
    sets = _draw(task, records, wanted, out, sampling, plan, origin, clock)
    if sets is None or plan.draw_only:
        return {}

    def judged(folder: str, name: str) -> list[Judgement]:
        place = out / f"{folder}.scores.jsonl"
        with clock("scoring", f"scoring {name}") as report:
            if plan.official:
                judgements = task.read_official(sets[folder])
            else:
                shared = score_shared(task, sets[folder], place, plan.shard, plan.patience, report)
                if shared is None:
                    return []
                judgements = shared
        _write_lines(place, [asdict(j) for j in judgements])
        return judgements

    if plan.shard[0] != 0:
        for folder in sorted(sets, key=lambda f: f != student.folder_name):  # rank 0 asks for the student's first
            judged(folder, folder)
        return {}
    mine = sets[student.folder_name]
    judgements = judged(student.folder_name, student.model.name)
    seen = overlap(records, trained_on) if trained_on is not None else set()
    run: dict[str, Any] = {
        "label": label or student.model.name,
        "task": _described(task, plan.official),
        "model": asdict(student.model),
        "settings": asdict(student.settings),
        "prompts": {
            "count": len(records),
            "hash": prompts_hash(records),
            "split": plan.split or task.splits[0],
            "sources": task.sources(plan.split or task.splits[0]),
            "tags": {t: sum(r.tag == t for r in records) for t in task.tags if any(r.tag == t for r in records)},
            "pictures": len(mine.entries),
            "samples": sampling.samples,
            "base_seed": sampling.base_seed,
            "overlap": {"known": trained_on is not None, "count": len(seen), "ids": sorted(seen)},
        },
        "pictures": {"folder": student.folder_name, "hash": mine.hash},
        "flags": _flags_of(out, student.folder_name),
        "scores": summarise(task, judgements),
    }
    if student.facts is not None:
        run["quantizer"] = student.facts()
    unseen = [j for j in judgements if j.prompt_id not in seen]
    if seen:
        run["scores_without_overlap"] = summarise(task, unseen) if unseen else None
    if plan.noise_seed is not None:
        folder = _noise_folder(student, plan.noise_seed)
        again = judged(folder, student.model.name)
        run["seed_sets"] = {
            "base_seeds": [sampling.base_seed, plan.noise_seed],
            "pictures": {"folder": folder, "hash": sets[folder].hash},
            "scores": summarise(task, again),
            **between_seed_sets(task, judgements, again),
        }
    if teacher is not None:
        theirs = sets[teacher.folder_name]
        same = teacher.folder_name == student.folder_name
        baseline = judgements if same else judged(teacher.folder_name, teacher.model.name)
        run["against"] = {
            "model": asdict(teacher.model),
            "settings": asdict(teacher.settings),
            "pictures": {"folder": teacher.folder_name, "hash": theirs.hash},
            "flags": _flags_of(out, teacher.folder_name),
            "scores": summarise(task, baseline),
        }
        run["paired"] = compare(task, judgements, baseline)
        if seen and unseen:
            kept_baseline = [j for j in baseline if j.prompt_id not in seen]
            run["paired_without_overlap"] = compare(task, unseen, kept_baseline)
        if plan.fidelity:
            with clock("fidelity", "measuring fidelity") as report:
                measured = fidelity.measure(
                    mine, theirs, task.object_mask(), report, plan.perceptual, details=task.details()
                )
            _write_lines(out / f"{student.folder_name}.fidelity.jsonl", [asdict(m) for m in measured])
            run["fidelity"] = fidelity.summary(measured)
            if plan.perceptual is not None:
                run["fidelity"]["lpips_weights"] = plan.perceptual.name
    run["seconds"] = {k: round(v, 3) for k, v in clock.seconds.items()}
    return {**run, **origin}


def _described(task: Task, official: bool) -> dict[str, Any]:
    """Suite, scorers, and for every scorer that is not the suite's own what it stands in for."""
    scorers = {"official": f"the suite's own scorer, run out of process on {task.name}'s folder layout"}
    return {
        "name": task.name,
        "version": task.version,
        "scorers": scorers if official else dict(task.scorers),
        "substitutes": {} if official else dict(task.substitutes),
        "official": official,
        "scored_by": "official scorer" if official else "substitutes" if task.substitutes else "tritflow",
    }


class _Clock:
    """Seconds by kind of work, and each piece's progress to whoever listens."""

    def __init__(self, stage: Stage | None) -> None:
        self.seconds: dict[str, float] = {}
        self._stage = stage

    @contextmanager
    def __call__(self, kind: str, name: str) -> Iterator[Progress | None]:
        started, stage = time.perf_counter(), self._stage
        try:
            yield (lambda done, total: stage(name, done, total)) if stage is not None else None
        finally:
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started


def _noise_folder(student: Contender, noise_seed: int) -> str:
    return f"{student.folder_name}-seed{noise_seed}"


def _picture_sets(
    student: Contender, teacher: Contender | None, sampling: Sampling, plan: Plan
) -> list[tuple[str, Contender, int]]:
    """(folder, who draws into it, base seed) of all pictures of a run; the teacher's first."""
    found = {}
    for who in (teacher, student):
        if who is not None:
            found[who.folder_name] = (who, sampling.base_seed)
    if plan.noise_seed is not None:
        if plan.noise_seed == sampling.base_seed:
            raise EvaluationError(f"--noise-seed {plan.noise_seed} is the run's own seed; take another one")
        found[_noise_folder(student, plan.noise_seed)] = (student, plan.noise_seed)
    return [(folder, *rest) for folder, rest in found.items()]


def _draw(
    task: Task,
    records: Sequence[PromptRecord],
    wanted: list[tuple[str, Contender, int]],
    out: Path,
    sampling: Sampling,
    plan: Plan,
    origin: dict[str, Any],
    clock: _Clock,
) -> dict[str, ImageSet] | None:
    """All picture sets by folder: this rank draws its share and waits for the others'. None when that is all."""
    versions = {k: v for k, v in origin["versions"].items() if k in ("torch", "diffusers", "pillow")}

    def draw(folder: str, who: Contender, base_seed: int, report: Progress | None) -> ImageSet | None:
        return draw_images(
            out / folder,
            task,
            records,
            partial(_load_noting, who, out, folder),
            who.model,
            who.settings,
            samples=sampling.samples,
            base_seed=base_seed,
            batch_size=sampling.batch_size,
            device=origin["device"],
            versions=versions,
            shard=plan.shard,
            lazy=True,
            progress=report,
        )

    sets: dict[str, ImageSet] = {}
    total = len(records) * sampling.samples
    waiting = []
    for folder, who, base_seed in wanted:
        with clock("drawing", f"drawing {who.model.name}") as report:
            images = draw(folder, who, base_seed, report)
        if images is None:
            waiting.append((folder, who, base_seed))
        else:
            sets[folder] = images
    rank = plan.shard[0]
    if rank != 0 and (plan.draw_only or plan.official):
        return None
    for folder, who, base_seed in waiting:
        with clock("waiting", "waiting for the other processes") as report:
            sets[folder] = wait_for(
                # Rank 0 joins what the ranks drew; the others wait for the joined folder.
                partial(draw, folder, who, base_seed, None) if rank == 0 else partial(finished, out / folder, task),
                lambda: project(out / folder, who.model.name, total, who.settings, earlier=False).present,  # noqa: B023
                total,
                f"{out / folder}: pictures",
                plan.patience,
                report,
            )
    return sets


def _load_noting(who: Contender, out: Path, folder: str) -> Draw:
    """Load a model, and leave beside its pictures by which path they are drawn; once for all of them."""
    draw = who.load()
    if who.flags is not None:
        flags, before = who.flags(), _flags_of(out, folder)
        if before is not None and before != flags:
            from tritflow.pipelines.flags import changed

            told = "; ".join(f"{key}: {old}, now {new}" for key, old, new in changed(before, flags))
            raise EvaluationError(
                f"{out / folder} holds pictures that were drawn another way ({told}); finish them there, "
                "or give another --out"
            )
        if before is None:
            write_atomically(_flags_path(out, folder), canonical(flags).encode())
    return draw


def _flags_path(out: Path, folder: str) -> Path:
    return out / f"{folder}.flags.json"


def _flags_of(out: Path, folder: str) -> dict[str, Any] | None:
    """By which path a folder's pictures were drawn; None where nobody noted it."""
    path = _flags_path(out, folder)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_atomically(path, "".join(canonical(r) + "\n" for r in rows).encode())
