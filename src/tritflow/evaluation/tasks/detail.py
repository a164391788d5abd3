"""Fine detail that a single picture shows, whatever its teacher drew: how sharp edges are, and what a suite adds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from tritflow.evaluation.tasks.fidelity import Pixels, luma

# Pixels around an edge among which its step is looked for, grey levels that a step has at least, and the least share of
# it within two pixels: flat pixels beside a perfect step have no slope and still the greatest of their neighbours.
_AROUND, _STEP, _LEAST = 7, 24, 0.15


@dataclass(frozen=True)
class Detail:
    """A measure of one picture.

    Attributes:
        name: in results.
        measure: of a uint8 [H, W, 3] picture, None where it shows nothing to measure; other processes import it.
        tags: of the suite's prompts, on whose pictures it means something (empty: on all).
    """

    name: str
    measure: Callable[[Pixels], float | None]
    tags: tuple[str, ...] = ()


def edge_sharpness(picture: Pixels) -> float | None:
    """Which share of an edge's step lies within two pixels, the median over the picture's edges; None without any.

    The reciprocal of an edge's width (Marziliano, Dufaux, Winkler, Ebrahimi 2002, "A no-reference perceptual blur
    metric"), free of its height: 2 |grad Y| over the range of luma Y in the 7 x 7 pixels around, where |grad Y| is a
    local maximum and the range 24 levels or more. 1 for a step between two pixels, .64 and .44 after a Gaussian blur of
    1 and 2 pixels.
    """
    levels = luma(picture)
    slope = np.hypot(*np.gradient(levels))
    step = maximum_filter(levels, _AROUND, mode="nearest") - minimum_filter(levels, _AROUND, mode="nearest")
    crest = slope >= maximum_filter(slope, 3, mode="nearest")
    edge = crest & (step >= _STEP) & (2 * slope >= _LEAST * step)
    if not edge.any():
        return None
    return float(np.median(2 * slope[edge] / step[edge]))


EDGE_SHARPNESS = Detail("edge_sharpness", edge_sharpness)
