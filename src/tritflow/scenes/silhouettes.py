"""Which shape is a silhouette? Whole ones by their box, partly hidden ones by a search over size and place."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from tritflow.scenes.render import shape_distances
from tritflow.scenes.world import SHAPES

Mask = NDArray[np.bool_]

# Whole silhouettes are compared on GRID x GRID points of their box.
GRID = 32
# Masks of the unit shapes: FINE points a side over -REACH..REACH, with an empty rim for points beyond.
FINE, REACH = 256, 1.25
# No shape reaches farther than this, in radii.
EXTENT = 1.13
# The coarse search's cells in half a part's longer side, and its radii in halves of that side.
CELLS = 10
SCALES = np.arange(0.88, 1.5, 0.08)
# Shapes that the fine search looks at, and its points in half a part's longer side at most.
FINALISTS, POINTS = 3, 16
# Below this coarse fit no fine search reaches what counts as an object.
HOPELESS = 0.55
# Shapes whose coarse fit is this much worse than the best are dropped; the fine search ends at this step in pixels.
CLOSE, FINEST = 0.15, 0.2
# Hidden area is a guess: a radius beyond the part's own costs this much a part's half side, and as many hidden pixels
# as the part has cost as much again.
GUESS = 0.02


@dataclass(frozen=True)
class Fit:
    """The best shape for a silhouette: its number, IoU and box; `drawn` is the whole shape, hidden pixels too, where
    some may be hidden."""

    shape: int
    score: float
    box: tuple[float, float, float, float]
    drawn: Mask | None = None


@lru_cache(maxsize=1)
def _fine() -> Mask:
    """Unit shapes: bool [len(SHAPES), FINE, FINE]."""
    axis = ((torch.arange(FINE) + 0.5) / FINE * 2 - 1) * REACH
    inside = shape_distances(axis[None, :].expand(FINE, FINE), axis[:, None].expand(FINE, FINE)) < 0
    return np.ascontiguousarray(inside.permute(2, 0, 1).numpy())


@lru_cache(maxsize=1)
def _boxed() -> Mask:
    """Unit shapes, each stretched to its own box: bool [len(SHAPES), GRID, GRID]."""
    return np.stack([_to_grid(shape) for shape in _fine()])


@lru_cache(maxsize=1)
def _coarse() -> NDArray[np.float32]:
    """Unit shapes at every radius of the coarse search, in cells: [len(SCALES), len(SHAPES), W * W]."""
    half = int(np.ceil(SCALES[-1] * 1.12 * CELLS)) + 1
    axis = np.arange(-half, half + 1.0)
    rows = [np.stack([_sample(s, axis / (CELLS * r), axis / (CELLS * r)) for s in range(len(SHAPES))]) for r in SCALES]
    return np.stack(rows).reshape(len(SCALES), len(SHAPES), -1).astype(np.float32)


def _sample(shape: int, x: NDArray[np.floating], y: NDArray[np.floating]) -> Mask:
    """A unit shape at the points x [W] by y [H]: bool [H, W]."""
    u, v = ((p * (FINE / 2 / REACH) + FINE / 2).astype(np.intp) for p in (x, y))
    return _fine()[shape].take(v, axis=0, mode="clip").take(u, axis=1, mode="clip")


def _bounds(part: Mask) -> tuple[int, int, int, int]:
    rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    return int(cols[0]), int(rows[0]), int(cols[-1]) + 1, int(rows[-1]) + 1


def _to_grid(mask: Mask) -> Mask:
    """Crop a mask to its box and sample it on GRID x GRID points."""
    x0, y0, x1, y1 = _bounds(mask)
    ys = (y0 + (np.arange(GRID) + 0.5) / GRID * (y1 - y0)).astype(int)
    xs = (x0 + (np.arange(GRID) + 0.5) / GRID * (x1 - x0)).astype(int)
    return mask[np.ix_(ys, xs)]


def likeness(part: Mask) -> NDArray[np.float64]:
    """IoU of a whole silhouette [H, W] with every shape in the silhouette's own box: [len(SHAPES)]."""
    grid, boxed = _to_grid(part), _boxed()
    return np.asarray((grid & boxed).sum((1, 2)) / (grid | boxed).sum((1, 2)))


def match(part: Mask) -> Fit:
    """Best shape of a whole silhouette [H, W], by `likeness`."""
    iou = likeness(part)
    best = int(iou.argmax())
    x0, y0, x1, y1 = _bounds(part)
    return Fit(best, float(iou[best]), (float(x0), float(y0), float(x1), float(y1)))


def fit(part: Mask, unknown: Mask) -> Fit:
    """Best shape, size and place of a silhouette [H, W] of which other objects may hide some: pixels of `unknown`
    count neither for nor against."""
    search = Search(part, unknown)
    return search.settle(0)


class Search:
    """Shapes that a partly hidden silhouette may have, found in three steps: all shapes on few cells, the best few on
    finer steps, and one of these (`settle`), pixel by pixel."""

    def __init__(self, part: Mask, unknown: Mask) -> None:
        x0, y0, x1, y1 = _bounds(part)
        self._size, self._centre = part.shape, ((x0 + x1) / 2, (y0 + y1) / 2)
        self._low = low = max(x1 - x0, y1 - y0) / 2
        self._seen = _Seen(part, unknown, self._centre, low)
        found = self._seen.candidates((x1 - x0) / 2 / low, (y1 - y0) / 2 / low)
        self._hopeless = found[0].score < HOPELESS
        if not self._hopeless:
            close = [p for p in found if p.score >= found[0].score - CLOSE]
            found = sorted((self._seen.refine(p, low / CELLS, low / CELLS / 2) for p in close), key=lambda p: -p.score)
        self._found = found
        self.fits = [self._fit(p) for p in found]

    def settle(self, choice: int) -> Fit:
        """The shape of `fits[choice]` at its best place."""
        if self._hopeless:
            return self.fits[choice]
        return self._fit(self._seen.refine(self._found[choice], self._low / CELLS / 4, FINEST))

    def _fit(self, best: _Placed) -> Fit:
        (height, width), radius = self._size, best.radius
        cx, cy = best.x + self._centre[0], best.y + self._centre[1]
        whole = _sample(best.shape, (np.arange(width) + 0.5 - cx) / radius, (np.arange(height) + 0.5 - cy) / radius)
        return Fit(best.shape, best.score, (cx - radius, cy - radius, cx + radius, cy + radius), whole)


@dataclass(frozen=True)
class _Placed:
    """A shape at a place, in pixels from the part's centre, and its score there."""

    score: float
    shape: int
    x: float
    y: float
    radius: float


class _Seen:
    """A part and what is not hidden of its surroundings, sampled around the part's centre; `low` is half its longer
    side in pixels. All places are relative to the centre."""

    def __init__(self, part: Mask, unknown: Mask, centre: tuple[float, float], low: float) -> None:
        self.part, self.unknown, self.centre, self.low = part, unknown, centre, low
        step = max(1.0, low / POINTS)
        # Half a pixel off the centre where needed, so that unit steps land on pixels.
        reach = np.ceil(2.6 * low / step) * step
        self.axis = np.arange(-reach + 0.5 * (step == 1.0 and (2 * low) % 2 == 0), reach + step / 2, step)
        self.fine_part, self.fine_free = self._around(self.axis)

    def _around(self, axis: NDArray[np.float64]) -> tuple[Mask, Mask]:
        """The part and the pixels that are not unknown at the points axis x axis; beyond the picture all is free."""
        (height, width), (cx, cy) = self.part.shape, self.centre
        xs, ys = np.floor(axis + cx).astype(np.int64), np.floor(axis + cy).astype(np.int64)
        inside = ((ys >= 0) & (ys < height))[:, None] & ((xs >= 0) & (xs < width))[None, :]
        at = np.ix_(ys.clip(0, height - 1), xs.clip(0, width - 1))
        return self.part[at] & inside, ~(self.unknown[at] & inside)

    def candidates(self, wide: float, high: float) -> list[_Placed]:
        """The best place of each of the best shapes on cells of low / CELLS, the best shape first."""
        bank = _coarse()
        half = (round(bank.shape[-1] ** 0.5) - 1) // 2
        span = int(np.ceil((SCALES[-1] - min(wide, high)) * CELLS)) + 1
        cell = self.low / CELLS
        part, free = self._around(np.arange(-half - span, half + span + 1.0) * cell)
        both = np.lib.stride_tricks.sliding_window_view(np.stack([part, free]), (2 * half + 1,) * 2, axis=(1, 2))
        # The shape's box and the part's box share a left, middle or right, and a top, middle or bottom.
        dx = np.rint((SCALES[:, None] - wide) * CELLS * np.array([-1, 0, 1])).astype(np.int64)
        dy = np.rint((SCALES[:, None] - high) * CELLS * np.array([-1, 0, 1])).astype(np.int64)
        dx, dy = np.repeat(dx, 3, axis=1), np.tile(dy, 3)
        windows = both[:, dy + span, dx + span].reshape(2, len(SCALES), 9, -1).astype(np.float32)
        common, drawn = (bank @ w.transpose(0, 2, 1) for w in windows)
        iou = common / np.maximum(drawn + part.sum() - common, 1)
        iou -= (GUESS * np.maximum(SCALES - 1, 0))[:, None, None]
        iou -= GUESS / max(int(part.sum()), 1) * (bank.sum(-1)[..., None] - drawn)
        by_shape = iou.transpose(1, 0, 2).reshape(len(SHAPES), -1)
        found = []
        for shape in np.argsort(-by_shape.max(1), kind="stable")[:FINALISTS]:
            scale, place = divmod(int(by_shape[shape].argmax()), 9)
            x, y = dx[scale, place] * cell, dy[scale, place] * cell
            score, radius = float(by_shape[shape].max()), float(SCALES[scale] * self.low)
            found.append(_Placed(score, int(shape), float(x), float(y), radius))
        return found

    def refine(self, start: _Placed, step: float, last: float) -> _Placed:
        """Compass search: one step along an axis at a time, half the step when none helps, down to `last`."""
        # Points farther out belong to neither part nor shape and cannot change the score.
        reach = max(self.low, max(abs(start.x), abs(start.y)) + EXTENT * start.radius + 3 * step) + 1
        near = slice(*np.searchsorted(self.axis, (-reach, reach)))
        axis, part, free = self.axis[near], self.fine_part[near, near], self.fine_free[near, near]
        area = int(np.count_nonzero(part))

        def score(x: float, y: float, radius: float) -> float:
            if max(abs(x), abs(y)) + EXTENT * radius > reach:
                return -1.0
            drawn = _sample(start.shape, (axis - x) / radius, (axis - y) / radius)
            common = int(np.count_nonzero(drawn & part))
            shown = int(np.count_nonzero(drawn & free))
            hidden = int(np.count_nonzero(drawn)) - shown
            iou = common / max(shown + area - common, 1)
            return iou - GUESS * max(0.0, radius / self.low - 1) - GUESS * hidden / area

        here = [start.x, start.y, start.radius]
        best = score(*here)
        while step >= last:
            moved = False
            for axis_number in (0, 1, 2):
                for way in (-step, step):
                    there = list(here)
                    there[axis_number] += way
                    value = score(*there)
                    if value > best:
                        here, best, moved = there, value, True
                        break
            if not moved:
                step /= 2
        return _Placed(best, start.shape, *here)
