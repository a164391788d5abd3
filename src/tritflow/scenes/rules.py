"""Does a picture show what its prompt asks for? GenEval's rules on this world's detections: include clauses AND,
counts exact when asked, position by box centres with a margin."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tritflow.scenes.detector import Detection
from tritflow.scenes.grammar import Clause, Prompt

# GenEval's margin: centres must lie apart by more than this share of the two boxes' sizes.
MARGIN = 0.1
# Silhouettes that fit their template worse than this are no object of the world.
MIN_SCORE = 0.7


@dataclass(frozen=True)
class Verdict:
    """Whether the picture passes, and the first reason why not."""

    passed: bool
    reason: str


def relation_holds(a: Detection, relation: str, b: Detection) -> bool:
    """Whether `a` stands in `relation` to `b`. In front of: the boxes overlap and `a` covers `b`."""
    ax, ay = (a.box[0] + a.box[2]) / 2, (a.box[1] + a.box[3]) / 2
    bx, by = (b.box[0] + b.box[2]) / 2, (b.box[1] + b.box[3]) / 2
    if relation == "in front of":
        overlap_x = min(a.box[2], b.box[2]) - max(a.box[0], b.box[0])
        overlap_y = min(a.box[3], b.box[3]) - max(a.box[1], b.box[1])
        return overlap_x > 0 and overlap_y > 0 and a.won > b.won
    width = (a.box[2] - a.box[0]) + (b.box[2] - b.box[0])
    height = (a.box[3] - a.box[1]) + (b.box[3] - b.box[1])
    dx, dy = ax - bx, ay - by
    # As in GenEval: the offset left after the margin, and its direction within 60 degrees of the axis.
    mx = max(abs(dx) - MARGIN * width, 0) * (1 if dx > 0 else -1)
    my = max(abs(dy) - MARGIN * height, 0) * (1 if dy > 0 else -1)
    norm = (mx * mx + my * my) ** 0.5
    if norm == 0:
        return False
    mx, my = mx / norm, my / norm
    return {"left of": mx < -0.5, "right of": mx > 0.5, "above": my < -0.5, "below": my > 0.5}[relation]


def judge(prompt: Prompt, detections: Sequence[Detection]) -> Verdict:
    """Judge one picture by what `detect` found in it."""
    seen = [d for d in detections if d.score >= MIN_SCORE]
    groups: list[list[Detection]] = []
    for clause in prompt.include:
        group = [d for d in seen if _fits(d, clause)]
        if len(group) < clause.count:
            return Verdict(False, f"expected {_name(clause)} >= {clause.count}, found {len(group)}")
        if prompt.tag == "counting" and len(group) != clause.count:
            return Verdict(False, f"expected {_name(clause)} = {clause.count}, found {len(group)}")
        groups.append(group)
    for clause, group in zip(prompt.include, groups, strict=True):
        if clause.relation is None or clause.target is None:
            continue
        other = groups[clause.target]
        if not any(relation_holds(a, clause.relation, b) for a in group for b in other if a is not b):
            return Verdict(False, f"no {_name(clause)} {clause.relation} {_name(prompt.include[clause.target])}")
    return Verdict(True, "")


def _fits(detection: Detection, clause: Clause) -> bool:
    return (
        detection.shape == clause.shape
        and clause.color in (None, detection.color)
        and clause.texture in (None, detection.texture)
    )


def _name(clause: Clause) -> str:
    return " ".join(w for w in (clause.texture, clause.color, clause.shape) if w)
