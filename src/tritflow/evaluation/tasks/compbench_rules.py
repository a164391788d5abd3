"""T2I-CompBench's formulas: from answers, boxes, depth and grades to one score in 0..1 a picture.

After Huang et al. 2023 (arXiv 2307.06350) and 2025 (T2I-CompBench++), with the constants of the project's scripts
(Karine-Huang/T2I-CompBench, MIT). Where the scripts do something the papers do not mention, the scripts decide,
because published tables come from them; each such place says so.

Boxes are in pixels of the frame that the detector sees (`FRAME`), since `NEAR` is a distance in that frame.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.detection import Box, Detection

FRAME = 479
"""Pixels of the shorter side that pictures are scaled to before detection."""
NEAR = 150.0
"""Pixels of the frame within which two objects are next to each other."""
FLAT_OVERLAP = 0.1
"""IoU from which a 2D relation loses credit."""
DEEP_OVERLAP = 0.5
"""IoU above which a 3D relation has full credit."""
MINIMUM_2D = 0.5
"""2D scores below this become 0."""
SAME_OBJECT = 0.9
"""Two boxes of one label that cover each other to this share are one object (numeracy)."""
CONFIDENCE = 0.5
"""Detections below this score do not exist (UniDet's setting in the scripts)."""
MAX_PHRASES = 8
"""At most so many noun phrases of a prompt are asked about."""

_SYNONYMS = {
    "boy": "person",
    "girl": "person",
    "man": "person",
    "woman": "person",
    "ship": "boat",
    "telivision": "tv",  # as the script spells it, so that "television" stays itself
    "goldfish": "fish",
    "painting": "picture",
}
_PEOPLE = ("boy", "girl", "man", "woman")


def detector_name(name: str, counting: bool = False) -> str:
    """The label under which an object of a prompt is looked for; numeracy knows more synonyms."""
    return _SYNONYMS.get(name, name) if counting or name in _PEOPLE else name


def attributes(answers: Sequence[float]) -> float:
    """Color, shape, texture: the product of P(yes) over the noun phrases; 1 without any.

    Every factor and the product are rounded to four digits, as the script's text files do.
    """
    product = 1.0
    for p in answers[:MAX_PHRASES]:
        product *= round(p, 4)
    return round(product, 4)


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union of areas; 0 where both are empty."""
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def relation_2d(relation: str, first: Box, second: Box) -> float:
    """0..1: how well `first` stands in `relation` to `second` on the picture plane.

    A side counts when the centres lie further apart along it than across it; from an IoU of `FLAT_OVERLAP` on the
    credit falls as `FLAT_OVERLAP / IoU`. Nearness counts when the centres are within `NEAR` along either axis, and
    falls with the larger distance. Other relations give 0.
    """
    dx = (second[0] + second[2]) / 2 - (first[0] + first[2]) / 2
    dy = (second[1] + second[3]) / 2 - (first[1] + first[3]) / 2
    if relation in ("next to", "on side of", "near"):
        return 1.0 if min(abs(dx), abs(dy)) < NEAR else NEAR / max(abs(dx), abs(dy))
    along = {"on the right of": -dx, "on the left of": dx, "on the bottom of": -dy, "on the top of": dy}
    if relation not in along:
        return 0.0
    across = dy if relation in ("on the right of", "on the left of") else dx
    if along[relation] <= abs(across):
        return 0.0
    overlap = box_iou(first, second)
    return 1.0 if overlap < FLAT_OVERLAP else FLAT_OVERLAP / overlap


def relation_3d(relation: str, first: Box, second: Box, depth: NDArray[np.floating]) -> float:
    """0..1: whether `first` is nearer ("in front of") or farther ("behind", "hidden") than `second`.

    `depth` is [H, W] in the frame, greater is nearer. The boxes' mean depths decide; credit is IoU / `DEEP_OVERLAP`,
    1 above it. As in the script, the box is cut from the map with x along its first axis, and an IoU of exactly
    `DEEP_OVERLAP` earns nothing.
    """
    overlap = box_iou(first, second)
    if overlap <= 0 or overlap == DEEP_OVERLAP:
        return 0.0
    parts = [depth[int(b[0]) : int(b[2]), int(b[1]) : int(b[3])] for b in (first, second)]
    if any(p.size == 0 for p in parts):
        return 0.0
    nearer = float(parts[0].mean(dtype=np.float64)) - float(parts[1].mean(dtype=np.float64))
    holds = nearer > 0 if relation == "in front of" else nearer < 0 if relation in ("behind", "hidden") else False
    return min(1.0, overlap / DEEP_OVERLAP) if holds else 0.0


def spatial_2d(relation: str, first: str, second: str, found: Sequence[Detection]) -> float:
    """2D spatial: a quarter of each object's confidence plus half the relation's score, 0 below `MINIMUM_2D`.

    Of each object the detector's first box with its very label counts.
    """
    a, b = (next((d for d in found if d.label == detector_name(name)), None) for name in (first, second))
    if a is not None and b is not None:
        score = 0.25 * a.score + 0.25 * b.score + relation_2d(relation, a.box, b.box) / 2
    else:
        alone = a or b
        score = 0.25 * alone.score if alone is not None else 0.0
    return score if score >= MINIMUM_2D else 0.0


def spatial_3d(
    relation: str, first: str, second: str, found: Sequence[Detection], depth: NDArray[np.floating]
) -> float:
    """3D spatial: a quarter of each object's confidence plus half the relation's score.

    A label that contains the object's name is enough. As in the script, with both objects there the box of each is
    the last matching one up to the detection at which both have been seen; with one, its first.
    """
    names = detector_name(first), detector_name(second)
    last: list[Detection | None] = [None, None]
    for d in found:
        last = [d if name in d.label else seen for name, seen in zip(names, last, strict=True)]
        if None not in last:
            break
    a, b = last
    if a is not None and b is not None:
        return 0.25 * a.score + 0.25 * b.score + relation_3d(relation, a.box, b.box, depth) / 2
    alone = next((d for name in names for d in found if name in d.label), None)
    return 0.25 * alone.score if alone is not None else 0.0


def _doubled(a: Box, b: Box) -> bool:
    # End pixels count here, unlike in `box_iou`: the script has two notions of area.
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]) + 1)
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]) + 1)
    size_a, size_b = ((x[2] - x[0] + 1) * (x[3] - x[1] + 1) for x in (a, b))
    shared = w * h
    # The smaller of the two areas gives the largest of the script's three ratios.
    return shared / min(size_a, size_b) > SAME_OBJECT


def numeracy(wanted: Sequence[tuple[str, int]], found: Iterable[Detection]) -> float:
    """Numeracy: equal shares to the prompt's objects, half for being there and half for the right number.

    Boxes of one label that cover each other are one object. A name that no label equals takes over the labels that
    contain it. Raises `EvaluationError` when nothing is wanted.
    """
    if not wanted:
        raise EvaluationError("a numeracy prompt names no object to count")
    distinct: list[Detection] = []
    for d in found:
        if not any(d.label == o.label and _doubled(d.box, o.box) for o in distinct):
            distinct.append(d)
    labels = [d.label for d in distinct]
    score = 0.0
    for name, number in wanted:
        name = detector_name(name, counting=True)
        if name not in labels:
            labels = [name if name in label else label for label in labels]
        counted = labels.count(name)
        score += (0.5 * (counted > 0) + 0.5 * (counted > 0 and counted == number)) / len(wanted)
    return score


def grade(level: int) -> float:
    """Non-spatial and complex: a judge's 1 to 5 as .2 to 1. Raises `EvaluationError` for another level."""
    if level not in (1, 2, 3, 4, 5):
        raise EvaluationError(f"a judge's grade is 1 to 5, not {level}")
    return level / 5
