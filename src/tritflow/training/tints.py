"""Hues that no word names, said in invented words: a colour becomes something that any shape can have.

A teacher that met rings in five colours alone learns which colours a ring never has, from pictures as much as from
captions, and the longer it trains the surer it gets. So in a share of the scenes each colour becomes another hue of the
whole circle, and its word in the caption an invented one that stands for a twelfth of the circle. A hue that would be
read as a held-out colour of its shape stays undrawn, so what is held out stays unseen.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritflow.scenes import COLORS, SHAPES, SceneBatch
from tritflow.scenes.render import hue as hue_of
from tritflow.scenes.render import palette
from tritflow.training.blends import held_out_colors, overlapping, readings
from tritflow.training.words import InventedWords

# Draws per colour before it keeps its own hue.
TRIES = 8


def tint(
    scenes: SceneBatch, clip_ids: Tensor, t5_ids: Tensor, words: InventedWords, share: float, seed: int
) -> tuple[SceneBatch, Tensor, Tensor]:
    """Give `share` of the scenes other hues, and their captions the invented words of those.

    Scenes with an object in front of another keep their colours, which were chosen to be told apart.

    Args:
        scenes: as drawn from the training stream, blended or not.
        clip_ids: [N, L] token ids of the captions.
        t5_ids: [N, L].
        words: of the same tokenizers.
        share: of scenes that change, 0 to 1.
        seed: of the draw.

    Returns:
        Scenes whose colours are the nearest named ones and whose `turn` holds the rest of the hue, and both token ids.
    """
    rng = np.random.default_rng(seed)
    kind, seen = scenes.kind.numpy(), readings(scenes)
    hues = hue_of(palette()).numpy()
    chosen = (rng.random(len(kind)) < share) & ~overlapping(scenes)
    hue = np.broadcast_to(hues, (len(kind), len(COLORS))).copy()
    moved = np.zeros_like(hue, dtype=bool)
    for _ in range(TRIES):
        drawn = rng.random(hue.shape)
        fits = chosen[:, None] & ~moved & _allowed(kind, seen, _nearest(drawn, hues))
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
    batch = replace(scenes, kind=torch.from_numpy(new), turn=torch.from_numpy(turn).float())
    return batch, words.replace(clip_ids, "clip", choice), words.replace(t5_ids, "t5", choice)


def _nearest(hue: Any, hues: Any) -> Any:
    """Number of the named colour whose hue (in turns) is nearest."""
    apart = np.abs(hue[..., None] - hues)
    return np.minimum(apart, 1 - apart).argmin(-1)


def _allowed(kind: Any, seen: Any, nearest: Any) -> Any:
    """[N, colours]: whether every object of that colour, read as one of `seen` [N, S, shapes], may have the colour
    `nearest` instead."""
    fine = np.ones(nearest.shape, dtype=bool)
    for slot in range(kind.shape[1]):
        rows = np.flatnonzero(kind[:, slot, 0] >= 0)
        color = kind[rows, slot, 1]
        never = seen[rows, slot] @ held_out_colors()
        fine[rows, color] &= ~never[np.arange(len(rows)), nearest[rows, color]]
    return fine
