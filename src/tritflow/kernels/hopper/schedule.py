"""Which block of the grid computes which part of which output tile: plain Python, decided before the launch.

A persistent GEMM keeps one block a multiprocessor. Whole tiles are dealt out wave by wave; the tiles of the last,
incomplete wave are cut along K so that every block gets the same number of steps ("stream-K": Osama et al.,
arXiv 2301.03598). Cut tiles come first in a block's list, so that summing their parts hides behind whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

# Columns of the table the kernel reads, one row of int32 a unit.
TOKEN, ROW, STEP, STEPS, PARTS, FIRST_SLOT, SLOT, COUNTER = range(8)
COLUMNS = 8
# What writing and summing the parts of a cut tile costs the busiest block, in K steps of whole-tile work.
SUM_STEPS = 2
# What a step of half the weight rows costs beyond half of a whole step (measured on an H200, M = 4608).
NARROW = 1.1


@dataclass(frozen=True)
class Schedule:
    """Units of work, sorted by block; block b owns ``units[starts[b]:starts[b + 1]]``.

    A unit is (first token, first weight row, first K step, K steps, parts of its tile, workspace slot of the
    tile's first part, own slot, counter). ``parts == 1`` is a whole tile, which needs neither slot nor counter;
    ``parts == 0`` is the half of a tile's weight rows that begins at the given row.
    """

    units: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    slots: int
    counters: int
    halves: bool = False

    @property
    def grid(self) -> int:
        return len(self.starts) - 1

    def critical_steps(self) -> float:
        """K steps of the busiest block, a half tile's for a half: the schedule's own estimate of its time."""
        weights = [unit[STEPS] * (1 if unit[PARTS] else NARROW / 2) for unit in self.units]
        return max(sum(weights[a:b]) for a, b in pairwise(self.starts))


def ordered_tiles(tiles_m: int, tiles_n: int, group: int) -> list[tuple[int, int]]:
    """Tiles (token tile, row tile) in bands of ``group`` token tiles, so that a wave shares what it reads."""
    order = []
    for first in range(0, tiles_m, group):
        band = range(first, min(first + group, tiles_m))
        order += [(tm, tn) for tn in range(tiles_n) for tm in band]
    return order


@lru_cache(maxsize=256)
def make_schedule(
    m: int,
    n: int,
    k: int,
    *,
    block_m: int,
    block_n: int,
    blocks: int,
    group: int = 8,
    tail: str = "whole",
    least_steps: int = 4,
) -> Schedule:
    """Deal the tiles of an [m, n] product over k (steps of 128) to at most ``blocks`` blocks.

    ``tail`` says what becomes of the tiles of the incomplete last wave. "whole" leaves them. "halve" makes two units
    of half the weight rows of each, if every block then gets at most one. "cut" cuts them along K where that shortens
    the busiest block's work by more than summing the parts costs; no part gets fewer than ``least_steps`` steps
    unless its tile has no more.
    """
    if min(m, n, k) < 1:
        raise ValueError(f"a schedule needs positive sizes, got M={m}, N={n}, K={k}")
    size = {"block_m": block_m, "block_n": block_n, "blocks": blocks, "group": group, "least_steps": least_steps}
    plain = _schedule(m, n, k, tail="whole", **size)
    if tail == "cut":
        cut = _schedule(m, n, k, tail="cut", **size)
        return cut if cut.critical_steps() + SUM_STEPS <= plain.critical_steps() else plain
    return _schedule(m, n, k, tail="halve", **size) if tail == "halve" else plain


def _schedule(
    m: int,
    n: int,
    k: int,
    *,
    block_m: int,
    block_n: int,
    blocks: int,
    group: int,
    tail: str,
    least_steps: int,
) -> Schedule:
    tiles = ordered_tiles(-(-m // block_m), -(-n // block_n), group)
    steps = -(-k // 128)
    waves, rest = divmod(len(tiles), blocks)
    whole, last = tiles[: waves * blocks], tiles[waves * blocks :]
    if tail == "whole" or (tail == "cut" and rest * steps < 2 * least_steps) or (tail == "halve" and 2 * rest > blocks):
        whole, last = tiles, []

    per_block: list[list[tuple[int, ...]]] = [[] for _ in range(blocks)]
    slots = counters = 0
    if last and tail == "cut":
        slots, counters = _deal_cut_tiles(per_block, last, steps, block_m, block_n, least_steps)
    for i, (tm, tn) in enumerate(whole):
        per_block[i % blocks].append((tm * block_m, tn * block_n, 0, steps, 1, 0, 0, 0))
    halves = False
    if last and tail == "halve":
        block = 0
        for tm, tn in last:
            for half in range(2):
                row = tn * block_n + half * (block_n // 2)
                if row < n:
                    per_block[block].append((tm * block_m, row, 0, steps, 0, 0, 0, 0))
                    block, halves = block + 1, True

    per_block = [units for units in per_block if units]
    starts = [0]
    for units in per_block:
        starts.append(starts[-1] + len(units))
    return Schedule(tuple(u for units in per_block for u in units), tuple(starts), slots, counters, halves)


def _deal_cut_tiles(
    per_block: list[list[tuple[int, ...]]],
    cut: list[tuple[int, int]],
    steps: int,
    block_m: int,
    block_n: int,
    least_steps: int,
) -> tuple[int, int]:
    """Cut the row of all tiles' steps into equal spans, one a block; returns the slots and counters in use."""
    total = len(cut) * steps
    span = max(-(-total // len(per_block)), min(least_steps, steps))
    edges = {(i * total) // -(-total // span) for i in range(-(-total // span))}
    pieces: list[list[tuple[int, int]]] = []  # per tile: (first step, steps)
    for t in range(len(cut)):
        lo, hi = t * steps, (t + 1) * steps
        inner = [e for e in sorted(edges) if lo < e < hi]
        # A sliver next to a tile's edge costs more in summing than it saves: give it to its neighbour.
        inner = [e for e in inner if e - lo >= min(least_steps, steps) and hi - e >= min(least_steps, steps)]
        bounds = [lo, *inner, hi]
        pieces.append([(a - lo, b - a) for a, b in pairwise(bounds)])
    load = [0] * len(per_block)
    slot = counter = 0
    block = 0
    for t, (tm, tn) in enumerate(cut):
        parts = len(pieces[t])
        for j, (first, count) in enumerate(pieces[t]):
            if load[block] and load[block] + count > span + least_steps:
                block = min(range(len(load)), key=load.__getitem__)
            own = (slot, slot + j, counter) if parts > 1 else (0, 0, 0)
            per_block[block].append((tm * block_m, tn * block_n, first, count, parts, *own))
            load[block] += count
            if load[block] >= span:
                block = min(range(len(load)), key=load.__getitem__)
        if parts > 1:
            slot += parts
            counter += 1
    return slot, counter
