"""Draw scenes in torch: signed distance functions, anti-aliased, in batches, on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritflow.scenes.world import COLORS, DARK, GRAY_LEVEL, PERIOD, RGB, SHAPES, TEXTURES, Scene

MAX_OBJECTS = 4
# A blend's edge is sharpened as far as its distance's slope is at least this.
FLATTEST = 0.3


@dataclass
class SceneBatch:
    """Scenes as tensors, `MAX_OBJECTS` slots each: kind [B, S, 3] (shape, colour, texture; shape -1 is an empty
    slot), place [B, S, 3] (x, y, radius), ground [B] (grey level in 0..1), and what may be left out: turn [B, S] (added
    to the hue of the slot's colour, in turns of the circle), other [B, S] (a second shape that the slot's is a blend
    with, -1: none) and mix [B, S] (the second shape's weight in it)."""

    kind: Tensor
    place: Tensor
    ground: Tensor
    turn: Tensor | None = None
    other: Tensor | None = None
    mix: Tensor | None = None

    @classmethod
    def from_scenes(cls, scenes: Sequence[Scene]) -> SceneBatch:
        """Stack scenes. Raises ValueError when one holds more than `MAX_OBJECTS` objects."""
        kind = np.full((len(scenes), MAX_OBJECTS, 3), -1, dtype=np.int64)
        place = np.zeros((len(scenes), MAX_OBJECTS, 3), dtype=np.float32)
        for i, scene in enumerate(scenes):
            if len(scene.objects) > MAX_OBJECTS:
                raise ValueError(f"scene {i} holds {len(scene.objects)} objects; at most {MAX_OBJECTS} can be drawn")
            for j, o in enumerate(scene.objects):
                kind[i, j] = SHAPES.index(o.shape), COLORS.index(o.color), TEXTURES.index(o.texture)
                place[i, j] = o.x, o.y, o.radius
        ground = torch.tensor([GRAY_LEVEL[s.background] for s in scenes])
        return cls(torch.from_numpy(kind), torch.from_numpy(place), ground)

    @classmethod
    def join(cls, parts: Sequence[SceneBatch]) -> SceneBatch:
        """All scenes of `parts`, in order."""
        joined: dict[str, Any] = {}
        for field in fields(cls):
            own = [getattr(p, field.name) for p in parts]
            if any(v is not None for v in own):
                absent = -1 if field.name == "other" else 0.0
                own = [
                    torch.full(p.kind.shape[:2], absent) if v is None else v for p, v in zip(parts, own, strict=True)
                ]
                joined[field.name] = torch.cat(own)
        return cls(**joined)

    def _each(self, change: Callable[[Tensor], Tensor]) -> SceneBatch:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        changed: dict[str, Any] = {name: None if v is None else change(v) for name, v in values.items()}
        return SceneBatch(**changed)

    def to(self, device: torch.device | str) -> SceneBatch:
        """The same batch on another device."""
        return self._each(lambda v: v.to(device))

    def __getitem__(self, index: slice | Tensor) -> SceneBatch:
        return self._each(lambda v: v[index])

    def __len__(self) -> int:
        return self.kind.shape[0]


def hue(rgb: Tensor) -> Tensor:
    """Hue of colours [..., 3] in turns, 0..1: the angle around the axis of greys."""
    r, g, b = rgb.unbind(-1)
    return torch.atan2(math.sqrt(3) * (g - b), 2 * r - g - b) / (2 * math.pi) % 1


def palette() -> Tensor:
    """The colours of the world [8, 3], in their order."""
    return torch.tensor([RGB[c] for c in COLORS])


def turned(rgb: Tensor, turn: Tensor) -> Tensor:
    """Colours [..., 3] of another hue and the same brightness; paler where the screen has none so strong."""
    grey = rgb.mean(-1, keepdim=True)
    away = rgb - grey
    r, g, b = away.unbind(-1)
    across = torch.stack([b - g, r - b, g - r], dim=-1) / math.sqrt(3)
    angle = 2 * math.pi * turn[..., None]
    away = away * torch.cos(angle) + across * torch.sin(angle)
    room = torch.where(away > 0, 1 - grey, grey) / away.abs().clamp(min=1e-6)
    return grey + away * room.amin(-1, keepdim=True).clamp(max=1)


def shape_distances(x: Tensor, y: Tensor) -> Tensor:
    """Signed distance of points to every shape of unit radius: [..., len(SHAPES)], negative inside.

    Exact on the edges; away from corners it may understate the distance, which anti-aliasing never sees.
    """
    r = torch.sqrt(x * x + y * y + 1e-12)
    circle = r - 1
    square = torch.maximum(x.abs(), y.abs()) - 0.88
    # Equilateral, point upward, circumradius 1.12, shifted down so that it sits centred in its box.
    ty = y - 0.2
    slant = math.sqrt(3) / 2
    triangle = torch.maximum(ty - 0.56, x.abs() * slant - ty * 0.5 - 0.56)
    # Five-pointed star: fold the angle into one half-sector; there one straight edge is left.
    sector = math.pi / 5
    angle = torch.atan2(x, -y)
    folded = (torch.remainder(angle, 2 * sector) - sector).abs()
    # folded = 0 points at an inner corner, folded = sector at an outer tip.
    outer, inner = 1.08, 0.46
    tip_x, tip_y = outer * math.cos(sector), outer * math.sin(sector)
    edge_x, edge_y = tip_x - inner, tip_y
    norm = math.hypot(edge_x, edge_y)
    star = ((r * torch.cos(folded) - inner) * edge_y - (r * torch.sin(folded)) * edge_x) / norm
    # A square on its corner (half diagonal a) with a half-disc on each upper side, centred in its box.
    a = 0.86
    hy = y - 0.1035 * a
    diamond = (x.abs() + hy.abs() - a) / math.sqrt(2)
    lobe = torch.sqrt((x.abs() - a / 2) ** 2 + (hy + a / 2) ** 2 + 1e-12) - a / math.sqrt(2)
    heart = torch.minimum(diamond, lobe)
    arm = 0.32
    bar = torch.maximum(x.abs() - 1, y.abs() - arm)
    post = torch.maximum(y.abs() - 1, x.abs() - arm)
    cross = torch.minimum(bar, post)
    ring = (r - 0.74).abs() - 0.26
    crescent = torch.maximum(r - 1, 0.86 - torch.sqrt((x - 0.46) ** 2 + y * y + 1e-12))
    return torch.stack([circle, square, triangle, star, heart, cross, ring, crescent], dim=-1)


def render(scenes: SceneBatch, size: int = 128) -> Tensor:
    """Draw a batch at `size` x `size` pixels: float tensor [B, 3, size, size] in 0..1, on the batch's device."""
    device = scenes.place.device
    colors = palette().to(device)
    axis = (torch.arange(size, device=device) + 0.5) / size
    image = scenes.ground[:, None, None, None].expand(-1, 3, size, size).clone()
    for slot in range(scenes.kind.shape[1]):
        shape, color, texture = scenes.kind[:, slot].unbind(-1)
        cx, cy, radius = scenes.place[:, slot].unbind(-1)
        safe = radius.clamp(min=1e-3)[:, None, None]
        x = ((axis[None, None, :] - cx[:, None, None]) / safe).expand(-1, size, size)
        y = ((axis[None, :, None] - cy[:, None, None]) / safe).expand(-1, size, size)
        index = shape.clamp(min=0)[:, None, None, None].expand(-1, size, size, 1)
        distances = shape_distances(x, y)
        pixels = distances.gather(-1, index)[..., 0] * safe * size
        if scenes.other is not None and scenes.mix is not None:
            second = scenes.other[:, slot, None, None, None].clamp(min=0).expand_as(index)
            pixels = _blended(
                pixels, distances.gather(-1, second)[..., 0] * safe * size, scenes.other[:, slot], scenes.mix[:, slot]
            )
        cover = (0.5 - pixels).clamp(0, 1) * (shape >= 0)[:, None, None]
        tone = _texture(x * safe, y * safe, texture, size)
        flat = colors[color.clamp(min=0)]
        if scenes.turn is not None:
            flat = turned(flat, scenes.turn[:, slot])
        paint = flat[:, :, None, None] * tone[:, None]
        image = image + cover[:, None] * (paint - image)
    return image


def _blended(first: Tensor, second: Tensor, other: Tensor, mix: Tensor) -> Tensor:
    """Distances [B, H, W] in pixels of blends, of the first shape alone where `other` [B] is -1. Two slopes that point
    apart leave a mean flatter than one: divided by its slope, an edge is as sharp as any."""
    mean = torch.lerp(first, second, mix[:, None, None])
    across, along = torch.gradient(mean, dim=(1, 2))
    slope = (across.square() + along.square()).sqrt().clamp(min=FLATTEST)
    return torch.where((other >= 0)[:, None, None], mean / slope, first)


def _texture(x: Tensor, y: Tensor, texture: Tensor, size: int) -> Tensor:
    """Brightness of each pixel [B, H, W]: 1 or `DARK`, edges anti-aliased. Phase is tied to the object's centre."""
    sharp = size * PERIOD / 2
    # A triangle wave of period PERIOD, scaled so that one pixel of slope smooths each edge.
    wave_x = ((torch.remainder(x / PERIOD + 0.25, 1.0) - 0.5).abs() * 4 - 1) * sharp / 2
    wave_y = ((torch.remainder(y / PERIOD + 0.25, 1.0) - 0.5).abs() * 4 - 1) * sharp / 2
    bit_x = (wave_x + 0.5).clamp(0, 1)
    bit_y = (wave_y + 0.5).clamp(0, 1)
    striped = bit_y
    checkered = bit_x * bit_y + (1 - bit_x) * (1 - bit_y)
    kind = texture[:, None, None]
    lit = torch.where(kind == 1, striped, torch.where(kind == 2, checkered, torch.ones_like(striped)))
    return DARK + (1 - DARK) * lit
