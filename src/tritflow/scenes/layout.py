"""Where things stand: colours, sizes and centres for the objects of a scene, drawn by rejection."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import torch

from tritflow.scenes.grammar import Clause
from tritflow.scenes.render import shape_distances
from tritflow.scenes.world import (
    COLORS,
    HELD_OUT_COLORS,
    SHAPES,
    SIZES,
    TEXTURES,
    Object,
    Scene,
)


class Retry(Exception):
    """A draw broke a rule (held out, or no room); draw again."""


def pick_color(rng: random.Random, shape: str) -> str:
    return rng.choice([c for c in COLORS if (shape, c) not in HELD_OUT_COLORS])


def pick_texture(rng: random.Random, plain: float = 0.6) -> str:
    if rng.random() < plain:
        return "solid"
    return rng.choice(TEXTURES[1:])


def pick_partner(rng: random.Random, shape: str) -> str:
    return rng.choice([s for s in SHAPES if s != shape])


def pick_radius(rng: random.Random, crowd: int, size: str | None = None) -> float:
    if size is not None:
        return rng.uniform(*SIZES[size])
    low, high = {1: (0.15, 0.25), 2: (0.135, 0.19), 3: (0.125, 0.165), 4: (0.12, 0.155)}[crowd]
    return rng.uniform(low, high)


def scatter(rng: random.Random, radii: list[float], gap: float = 0.03) -> list[tuple[float, float]]:
    """Centres without overlap, the larger discs first; raises Retry when there is no room."""
    centres: dict[int, tuple[float, float]] = {}
    for i in sorted(range(len(radii)), key=lambda i: -radii[i]):
        reach = radii[i] * 1.12 + 0.015
        for _ in range(60):
            x, y = rng.uniform(reach, 1 - reach), rng.uniform(reach, 1 - reach)
            # Boxes, not discs: squares and crosses fill their corners.
            if all(max(abs(x - a), abs(y - b)) > (radii[i] + radii[j]) * 1.1 + gap for j, (a, b) in centres.items()):
                centres[i] = (x, y)
                break
        else:
            raise Retry
    return [centres[i] for i in range(len(radii))]


def fill(rng: random.Random, clause: Clause, x: float, y: float, radius: float) -> Object:
    color = clause.color or pick_color(rng, clause.shape)
    texture = clause.texture or pick_texture(rng, plain=0.75)
    return Object(clause.shape, color, texture, x, y, radius)


def related(rng: random.Random, relation: str, ra: float, rb: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres of A and B so that `A relation B` is plain to see."""
    across = rng.uniform(-0.5, 0.5)
    low = (ra + rb) * 1.1 + 0.03
    along = rng.uniform(low, max(low + 0.01, min(0.62, 0.97 - (ra + rb) * 1.12)))
    side = along * math.tan(across * 0.9)
    dx, dy = {
        "left of": (-along, side),
        "right of": (along, side),
        "above": (side, -along),
        "below": (side, along),
    }[relation]
    spans = []
    for d in (dx, dy):
        lo = max(ra * 1.12 + 0.015 - d, rb * 1.12 + 0.015)
        hi = min(1 - ra * 1.12 - 0.015 - d, 1 - rb * 1.12 - 0.015)
        if lo > hi:
            raise Retry
        spans.append(rng.uniform(lo, hi))
    bx, by = spans
    return (bx + dx, by + dy), (bx, by)


def occluding(rng: random.Random, ra: float, rb: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Centres of A (in front) and B (behind): A covers part of B, and most of B stays visible."""
    for _ in range(40):
        angle = rng.uniform(0, 2 * math.pi)
        distance = (ra + rb) * rng.uniform(0.48, 0.78)
        dx, dy = distance * math.cos(angle), distance * math.sin(angle)
        reach_a, reach_b = ra * 1.12 + 0.015, rb * 1.12 + 0.015
        bx, by = rng.uniform(reach_b, 1 - reach_b), rng.uniform(reach_b, 1 - reach_b)
        ax, ay = bx + dx, by + dy
        if reach_a < ax < 1 - reach_a and reach_a < ay < 1 - reach_a:
            return (ax, ay), (bx, by)
    raise Retry


def scene_of_count(rng: random.Random, told: Clause, ground: str) -> Scene:
    radii = [pick_radius(rng, max(told.count, 2)) for _ in range(told.count)]
    # One colour and texture for the whole group unless the caption leaves them open.
    same = told.color is not None or rng.random() < 0.5
    first = fill(rng, told, 0, 0, 0)
    objects = []
    for (x, y), r in zip(scatter(rng, radii), radii, strict=True):
        clause = replace(told, color=first.color, texture=first.texture) if same else told
        objects.append(fill(rng, clause, x, y, r))
    return Scene(tuple(objects), ground)


def hue_gap(a: str, b: str) -> int:
    d = abs(COLORS.index(a) - COLORS.index(b))
    return min(d, len(COLORS) - d)


def scene_of_front(rng: random.Random, front: Clause, behind: Clause, ground: str) -> Scene:
    ra, rb = rng.uniform(0.13, 0.17), rng.uniform(0.18, 0.23)
    (ax, ay), (bx, by) = occluding(rng, ra, rb)
    a, b = fill(rng, front, ax, ay, ra), fill(rng, behind, bx, by, rb)
    if hue_gap(a.color, b.color) < 2:
        raise Retry
    if not 0.08 < covered_share(a, b) < 0.5:
        raise Retry
    return Scene((b, a), ground, front=1)


def covered_share(front: Object, behind: Object) -> float:
    """How much of `behind` lies under `front`: hollow shapes and corners cover less than their boxes do."""
    axis = (torch.arange(32) + 0.5) / 32 * 2.4 - 1.2
    x, y = axis[None, :].expand(32, 32), axis[:, None].expand(32, 32)
    under = shape_distances(x, y)[..., SHAPES.index(behind.shape)] < 0
    x = (x * behind.radius + behind.x - front.x) / front.radius
    y = (y * behind.radius + behind.y - front.y) / front.radius
    over = shape_distances(x, y)[..., SHAPES.index(front.shape)] < 0
    return float((under & over).sum() / under.sum())
