"""What exists in the built-in world, and which combinations are held out from training.

Coordinates are shares of the picture's side, x to the right and y downward, so one scene can be drawn at any size.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from dataclasses import dataclass, field
from typing import Any, TypeVar

SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
TEXTURES = ("solid", "striped", "checkered")
BACKGROUNDS = ("white", "gray", "black")
COUNTS = (2, 3, 4)

# Far apart in hue, so that a picture can be read back by hue alone; brightness is free for textures.
RGB = {
    "red": (0.90, 0.10, 0.12),
    "orange": (0.98, 0.52, 0.04),
    "yellow": (0.96, 0.90, 0.08),
    "green": (0.12, 0.72, 0.18),
    "cyan": (0.08, 0.80, 0.84),
    "blue": (0.12, 0.26, 0.92),
    "purple": (0.54, 0.14, 0.86),
    "pink": (0.98, 0.30, 0.72),
}
# Neutral, so that chroma separates objects from the ground.
GRAY_LEVEL = {"white": 0.95, "gray": 0.55, "black": 0.07}

# Textures alternate the object's colour with this share of its brightness.
DARK = 0.42
# Period of stripes and checkers as a share of the picture's side: 8 pixels at 128.
PERIOD = 1 / 16

SIZES = {"small": (0.105, 0.125), "medium": (0.135, 0.17), "large": (0.20, 0.24)}


Combination = TypeVar("Combination", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Object:
    """One object: what it is, its centre (x, y) and its radius, in shares of the side."""

    shape: str
    color: str
    texture: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Scene:
    """Objects in painter's order (the last is in front) on a neutral ground."""

    objects: tuple[Object, ...]
    background: str = "gray"
    # Index of the object that may cover another; -1 when no two objects touch.
    front: int = field(default=-1, compare=False)


def _share(kind: str, combinations: list[Combination], share: float = 0.2) -> frozenset[Combination]:
    """The `share` of combinations with the smallest SHA-256: a choice by hash that nobody made."""
    ranked = sorted(combinations, key=lambda c: hashlib.sha256(f"{kind}:{'|'.join(map(str, c))}".encode()).hexdigest())
    return frozenset(ranked[: math.ceil(share * len(ranked))])


def canonical(shape_a: str, relation: str, shape_b: str) -> tuple[str, str, str]:
    """One name for `A right of B` and `B left of A`, for `A below B` and `B above A`."""
    if relation == "right of":
        return (shape_b, "left of", shape_a)
    if relation == "below":
        return (shape_b, "above", shape_a)
    return (shape_a, relation, shape_b)


# Never in a training scene: an object of such a shape and colour; such a count of one shape. Never stated in a training
# caption: such a relation, from either side ("A and B" in this order counts as one: two things named together, their
# places left open). Textures and pairs of shapes are all met in training: there are too few of
# them (16 and 28) to learn from the rest that the missing ones can exist, and a teacher that doubts a whole tag
# hides what quantization loses there.
HELD_OUT_COLORS = _share("shape-color", list(itertools.product(SHAPES, COLORS)))
HELD_OUT_COUNTS = _share("shape-count", list(itertools.product(SHAPES, COUNTS)))
HELD_OUT_RELATIONS = _share(
    "shape-relation-shape",
    [(a, r, b) for a, b in itertools.permutations(SHAPES, 2) for r in ("left of", "above", "in front of", "and")],
)


def relation_is_held_out(shape_a: str, relation: str, shape_b: str) -> bool:
    """Whether `A relation B`, or the same fact told from B, is kept out of training captions."""
    return canonical(shape_a, relation, shape_b) in HELD_OUT_RELATIONS
