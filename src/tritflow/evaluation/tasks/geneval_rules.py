"""GenEval's decision rules on what a detector found: one verdict a picture, nothing learned in here.

After Ghosh, Hajishirzi and Schmidt 2023 (arXiv 2310.11513) with the thresholds of the project's scorer
(djghosh13/geneval, MIT). Where the paper leaves room the scorer decides: thresholds are exclusive, of equal scores
the later detection counts as the better one, colours and positions are asked of the `count` best detections only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.detection import Box, Detection

THRESHOLD = 0.3
COUNTING_THRESHOLD = 0.9
MAX_OBJECTS = 16
MAX_OVERLAP = 1.0
"""Suppression of overlapping boxes of one class; 1 is off, as in the published scores."""
POSITION_MARGIN = 0.1

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")

Objects = Mapping[str, Sequence[Detection]]
"""The detections that count, by class, best first; classes without any are left out."""

ColorOf = Callable[[Detection], str]


def threshold_for(metadata: Mapping[str, Any]) -> float:
    """A detection counts above this score: a stricter one where objects are counted."""
    return COUNTING_THRESHOLD if metadata["tag"] == "counting" else THRESHOLD


def iou(a: Box, b: Box) -> float:
    """Intersection over union with both end pixels inside a box (a box of x0 = x1 is one pixel wide)."""
    shared = _pixels(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    union = _pixels(*a) + _pixels(*b) - shared
    return shared / union if union else 0.0


def _pixels(x0: float, y0: float, x1: float, y1: float) -> float:
    return max(x1 - x0 + 1, 0) * max(y1 - y0 + 1, 0)


def keep(
    detections: Iterable[Detection],
    threshold: float,
    max_objects: int = MAX_OBJECTS,
    max_overlap: float = MAX_OVERLAP,
) -> dict[str, list[Detection]]:
    """The detections that count: above `threshold`, the best `max_objects` a class, then suppression.

    A detection is suppressed when its IoU with a better one that was kept is `max_overlap` or more; a suppressed one
    still uses up a place among the `max_objects`.
    """
    classes: dict[str, list[Detection]] = {}
    for d in detections:
        if d.score > threshold:
            classes.setdefault(d.label, []).append(d)
    for label, found in classes.items():
        # Reversing a stable ascending sort puts the later of two equals first.
        best = sorted(found, key=lambda d: d.score)[::-1][:max_objects]
        if max_overlap != 1.0:
            chosen: list[Detection] = []
            for d in best:
                if not any(iou(d.box, c.box) >= max_overlap for c in chosen):
                    chosen.append(d)
            best = chosen
        classes[label] = best
    return classes


def relations(a: Box, b: Box) -> frozenset[str]:
    """Where A lies relative to B: none, one or two of "left of", "right of", "above", "below".

    The offset of the centres is shortened, axis by axis, by `POSITION_MARGIN` times the two boxes' summed size and
    divided by its full length; an axis counts when more than one half is left.
    """
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    x = max(abs(dx) - POSITION_MARGIN * (abs(a[2] - a[0]) + abs(b[2] - b[0])), 0.0)
    y = max(abs(dy) - POSITION_MARGIN * (abs(a[3] - a[1]) + abs(b[3] - b[1])), 0.0)
    if x < 1e-3 and y < 1e-3:
        return frozenset()
    length = math.sqrt(dx * dx + dy * dy)
    found = []
    if x / length > 0.5:
        found.append("right of" if dx > 0 else "left of")
    if y / length > 0.5:
        found.append("below" if dy > 0 else "above")
    return frozenset(found)


def asked_for_color(metadata: Mapping[str, Any], objects: Objects) -> Iterator[Detection]:
    """The detections whose colour `judge` will ask for, so that they can be classified in one batch beforehand."""
    for clause in metadata.get("include", ()):
        found = objects.get(clause["class"], ())[: clause["count"]]
        if "color" in clause and len(found) == clause["count"]:
            yield from found


def judge(metadata: Mapping[str, Any], objects: Objects, color_of: ColorOf) -> tuple[bool, str]:
    """(passed, why not): every `include` clause must hold and no `exclude` clause may.

    An `include` clause holds when its class was found `count` times, the `count` best ones have its colour, and each
    of them stands in its position to each object of the earlier clause it refers to (which must hold itself).

    Raises `EvaluationError` for a position that refers to no earlier clause.
    """
    reasons: list[str] = []
    groups: list[Sequence[Detection] | None] = []
    for clause in metadata.get("include", ()):
        name, count = clause["class"], clause["count"]
        found = objects.get(name, ())[:count]
        why = ""
        if len(found) < count:
            why = f"found {len(found)} {name} of {count}"
        elif "color" in clause:
            colors = [color_of(d) for d in found]
            if colors.count(clause["color"]) < count:
                why = f"{name} is {', '.join(colors)} instead of {clause['color']}"
        if not why and "position" in clause:
            relation, target = clause["position"]
            if not 0 <= target < len(groups):
                raise EvaluationError(f"the position of '{name}' refers to clause {target}, which does not come before")
            why = _position(name, found, relation, groups[target])
        groups.append(None if why else found)
        if why:
            reasons.append(why)
    for clause in metadata.get("exclude", ()):
        number = len(objects.get(clause["class"], ()))
        if number >= clause["count"]:
            reasons.append(f"found {number} {clause['class']}, fewer than {clause['count']} wanted")
    return not reasons, "; ".join(reasons)


def _position(name: str, found: Sequence[Detection], relation: str, targets: Sequence[Detection] | None) -> str:
    if targets is None:
        return f"nothing for {name} to be {relation}"
    for d in found:
        for target in targets:
            seen = relations(d.box, target.box)
            if relation not in seen:
                return f"{name} is {' and '.join(sorted(seen)) or 'beside no side'} of its target, not {relation}"
    return ""
