"""Hues that no word names, said in invented words: a colour becomes something that any shape can have.

A teacher that met rings in five colours alone learns which colours a ring never has, from pictures as much as from
captions, and the longer it trains the surer it gets. So in a share of the scenes each colour becomes another hue of the
whole circle, and its word in the caption an invented one that stands for a twelfth of the circle. A hue that would be
read as a held-out colour of its shape stays undrawn, so what is held out stays unseen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritflow.scenes import COLORS, SHAPES, SceneBatch
from tritflow.scenes.render import hue as hue_of
from tritflow.scenes.render import palette
from tritflow.scenes.world import HELD_OUT_COLORS
from tritflow.training.words import InventedWords

# Draws per colour before it keeps its own hue.
TRIES = 8


def tint(
    scenes: SceneBatch, clip_ids: Tensor, t5_ids: Tensor, words: InventedWords, share: float, seed: int
) -> tuple[SceneBatch, Tensor, Tensor]:
    """Give `share` of the scenes other hues, and their captions the invented words of those.

    Scenes with an object in front of another keep their colours, which were chosen to be told apart.

    Args:
        scenes: as drawn from the training stream.
        clip_ids: [N, L] token ids of the captions.
        t5_ids: [N, L].
        words: of the same tokenizers.
        share: of scenes that change, 0 to 1.
        seed: of the draw.

    Returns:
        Scenes whose colours are the nearest named ones and whose `turn` holds the rest of the hue, and both token ids.
    """
    rng = np.random.default_rng(seed)
    kind = scenes.kind.numpy()
    hues = hue_of(palette()).numpy()
    chosen = (rng.random(len(kind)) < share) & ~_overlapping(scenes)
    hue = np.broadcast_to(hues, (len(kind), len(COLORS))).copy()
    moved = np.zeros_like(hue, dtype=bool)
    for _ in range(TRIES):
        drawn = rng.random(hue.shape)
        fits = chosen[:, None] & ~moved & _allowed(kind, _nearest(drawn, hues))
        hue, moved = np.where(fits, drawn, hue), moved | fits
    nearest = np.where(moved, _nearest(hue, hues), np.arange(len(COLORS)))
    slots = np.maximum(kind[..., 1], 0)
    rows = np.arange(len(kind))[:, None]
    named = np.where(kind[..., 0] >= 0, nearest[rows, slots], kind[..., 1])
    turn = np.where(kind[..., 0] >= 0, hue[rows, slots] - hues[np.maximum(named, 0)], 0.0)
    new = kind.copy()
    new[..., 1] = named
    choice = words.none(len(kind))
    first, count = words.colors()
    choice[:, len(SHAPES) : len(SHAPES) + len(COLORS)] = torch.from_numpy(
        np.where(moved, first + (hue * count).astype(np.int64) % count, -1)
    )
    batch = SceneBatch(torch.from_numpy(new), scenes.place, scenes.ground, torch.from_numpy(turn).float())
    return batch, words.replace(clip_ids, "clip", choice), words.replace(t5_ids, "t5", choice)


def _nearest(hue: Any, hues: Any) -> Any:
    """Number of the named colour whose hue (in turns) is nearest."""
    apart = np.abs(hue[..., None] - hues)
    return np.minimum(apart, 1 - apart).argmin(-1)


def _allowed(kind: Any, nearest: Any) -> Any:
    """[N, colours]: whether every object of that colour may have the colour `nearest` instead."""
    held = np.zeros((len(SHAPES), len(COLORS)), dtype=bool)
    for shape, color in HELD_OUT_COLORS:
        held[SHAPES.index(shape), COLORS.index(color)] = True
    fine = np.ones(nearest.shape, dtype=bool)
    for slot in range(kind.shape[1]):
        shape, color = kind[:, slot, 0], kind[:, slot, 1]
        rows = np.flatnonzero(shape >= 0)
        fine[rows, color[rows]] &= ~held[shape[rows], nearest[rows, color[rows]]]
    return fine


def _overlapping(scenes: SceneBatch) -> Any:
    """Whether any two objects of a scene come near each other."""
    place, there = scenes.place.numpy(), scenes.kind.numpy()[..., 0] >= 0
    near = np.zeros(len(place), dtype=bool)
    for a in range(place.shape[1]):
        for b in range(a):
            apart = np.maximum(np.abs(place[:, a, 0] - place[:, b, 0]), np.abs(place[:, a, 1] - place[:, b, 1]))
            near |= there[:, a] & there[:, b] & (apart < 0.8 * (place[:, a, 2] + place[:, b, 2]))
    return near
