"""Pictures looked at by several processes: how many this one may start, and work handed to them piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

from tritflow.evaluation.ranks import number_of_environment
from tritflow.formats.environment import usable_cores

T = TypeVar("T")
R = TypeVar("R")


def workers_of_environment(most: int = 16) -> int:
    """How many worker processes this one may start: its share of the processors, `most` at most."""
    return max(1, min(most, usable_cores() // max(1, number_of_environment("LOCAL_WORLD_SIZE", 1))))


def by_chunks(work: Callable[[Sequence[T]], R], items: Sequence[T], size: int, workers: int) -> Iterator[R]:
    """`work` of every `size` items, in order: here, or by `workers` processes where these are two or more; what it
    takes and gives, and itself, must then be picklable."""
    chunks = [items[i : i + size] for i in range(0, len(items), size)]
    if workers < 2:
        yield from map(work, chunks)
        return
    # spawn: forking a process that holds torch's threads and perhaps a GPU can deadlock.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(work, chunks)
