"""Which block of the grid computes which output tiles: plain Python, decided before the launch.

A persistent product keeps one block a multiprocessor, and whole tiles are dealt out wave by wave.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

# Columns of the table the kernel reads, one row of int32 a unit.
TOKEN, ROW, STEP, STEPS = range(4)
# What a step of half the weight rows costs beyond half of a whole step (measured on an H200, M = 4608).
NARROW = 1.1


@dataclass(frozen=True)
class Schedule:
    """Units of work, sorted by block; block b owns ``units[starts[b]:starts[b + 1]]``.

    A unit is (first token, first weight row, first K step, K steps).
    """

    units: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]

    @property
    def grid(self) -> int:
        return len(self.starts) - 1

    def critical_steps(self) -> int:
        """K steps of the busiest block: the schedule's own estimate of its time."""
        return max(sum(unit[STEPS] for unit in self.units[a:b]) for a, b in pairwise(self.starts))


def ordered_tiles(tiles_m: int, tiles_n: int, group: int) -> list[tuple[int, int]]:
    """Tiles (token tile, row tile) in bands of ``group`` token tiles, so that a wave shares what it reads."""
    order = []
    for first in range(0, tiles_m, group):
        band = range(first, min(first + group, tiles_m))
        order += [(tm, tn) for tn in range(tiles_n) for tm in band]
    return order


@lru_cache(maxsize=256)
def make_schedule(m: int, n: int, k: int, *, block_m: int, block_n: int, blocks: int, group: int = 8) -> Schedule:
    """Deal the tiles of an [m, n] product over k (steps of 128) to at most ``blocks`` blocks."""
    if min(m, n, k) < 1:
        raise ValueError(f"a schedule needs positive sizes, got M={m}, N={n}, K={k}")
    steps = -(-k // 128)
    per_block: list[list[tuple[int, ...]]] = [[] for _ in range(blocks)]
    for i, (tm, tn) in enumerate(ordered_tiles(-(-m // block_m), -(-n // block_n), group)):
        per_block[i % blocks].append((tm * block_m, tn * block_n, 0, steps))
    per_block = [units for units in per_block if units]
    starts = [0]
    for units in per_block:
        starts.append(starts[-1] + len(units))
    return Schedule(tuple(u for units in per_block for u in units), tuple(starts))
