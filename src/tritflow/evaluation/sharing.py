"""Work shared between processes that see one disk: waiting for the others, and scoring by parts.

Ranks talk through files alone. A file may be an earlier run's, so every part says what it was made from, and waiting
ends in an error when nothing has moved for long: a rank that died writes nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from tritflow.evaluation.api import Judgement, Progress, Task
from tritflow.evaluation.images import ImageSet, ImageSetError, demand, read_lines, verdict_of
from tritflow.evaluation.ledger import join_ledgers, open_ledger
from tritflow.evaluation.projection import duration
from tritflow.results import canonical, write_atomically

WAIT = 2.0
"""Seconds between two looks at what other ranks have done."""

T = TypeVar("T")


def wait_for(
    look: Callable[[], T | None],
    moved: Callable[[], int],
    total: int,
    what: str,
    patience: float,
    report: Progress | None,
) -> T:
    """What `look` finds at last, asked every `WAIT` seconds.

    Raises `ImageSetError` when `moved` (how far the others are, of `total`) has not grown for `patience` seconds.
    """
    last, most = time.monotonic(), -1
    while (found := look()) is None:
        done = moved()
        if done > most:
            last, most = time.monotonic(), done
        elif time.monotonic() - last > patience:
            raise ImageSetError(
                f"{what}: {done} of {total}, and the other processes have added none for {duration(patience)}; "
                "run the same command again"
            )
        if report is not None:
            report(done, total)
        time.sleep(WAIT)
    return found


def finished(folder: Path, task: Task) -> ImageSet | None:
    """The picture set in `folder` once it is whole; None before."""
    try:
        return ImageSet.open(folder, task)
    except ImageSetError:
        return None


def score_shared(
    task: Task,
    images: ImageSet,
    place: Path,
    shard: tuple[int, int],
    patience: float,
    progress: Progress | None,
) -> list[Judgement] | None:
    """`task.score` with every rank scoring each world-th picture; rank 0 gathers, the others get None.

    Verdicts are kept beside `place` as they come (`ledger`), so that a killed pass goes on where it stopped. Parts lie
    there until they are gathered; `task.scorers` and `task.substitutes` are then those of all ranks.
    Raises `ImageSetError` when a rank scored with other scorers, or none for `patience` seconds.
    """
    rank, world = shard
    if world == 1:
        ledger = open_ledger(task, images, place, shard)
        judgements = task.score(images, progress, ledger)
        ledger.finish(images.entries)
        return judgements
    share = ImageSet(images.folder, images.meta, images.records, images.entries[rank::world])
    own = task.score(share, progress, open_ledger(task, share, place, shard))
    if rank != 0:
        _write_part(_part(place, rank), task, images, own, world)
        return None
    parts = {0: own}

    def gathered() -> dict[int, list[Judgement]] | None:
        for other in range(1, world):
            if other not in parts:
                found = _read_part(_part(place, other), task, images, world)
                if found is not None:
                    parts[other] = found
        return parts if len(parts) == world else None

    wait_for(gathered, lambda: len(parts), world, f"{place}: parts of the scores", patience, None)
    for other in range(1, world):
        _part(place, other).unlink(missing_ok=True)
    by_picture = {(j.prompt_id, j.sample): j for part in parts.values() for j in part}
    whole = [by_picture[e["prompt_id"], e["sample"]] for e in images.entries]
    join_ledgers(task, images, place, world, whole)
    return whole


def drop_parts(folder: Path, rank: int) -> None:
    """Remove what a killed run of this rank left below `folder`, before rank 0 takes it for this run's."""
    for path in folder.glob(f"*.scores.jsonl.{rank}"):
        path.unlink(missing_ok=True)


def _part(place: Path, rank: int) -> Path:
    return place.with_name(f"{place.name}.{rank}")


def _write_part(path: Path, task: Task, images: ImageSet, judgements: list[Judgement], world: int) -> None:
    header = {
        "pictures": images.hash,
        "world": world,
        "scorers": dict(task.scorers),
        "substitutes": dict(task.substitutes),
    }
    write_atomically(path, "".join(canonical(r) + "\n" for r in [header, *map(asdict, judgements)]).encode())


def _read_part(path: Path, task: Task, images: ImageSet, world: int) -> list[Judgement] | None:
    """Another rank's judgements; None while they are not there, or are of other pictures (a run before this one)."""
    lines: list[dict[str, Any]] = read_lines(path)
    if not lines or (lines[0].get("pictures"), lines[0].get("world")) != (images.hash, world):
        return None
    demand(lines[0], {"scorers": dict, "substitutes": dict}, f"{path}: line 1")
    theirs = lines[0]["scorers"]
    for role in theirs.keys() & task.scorers.keys():
        if theirs[role] != task.scorers[role]:
            raise ImageSetError(
                f"{path}: scored by {theirs[role]}, here it is {task.scorers[role]}; delete the file, and start every "
                "process with the same scorers"
            )
    # A rank whose pictures needed no depth, say, knows no depth model.
    task.scorers = {**theirs, **task.scorers}
    task.substitutes = {**lines[0]["substitutes"], **task.substitutes}
    return [verdict_of(line, f"{path}: line {number}") for number, line in enumerate(lines[1:], 2)]
