"""Shapes between the shapes, told in invented nouns: a count becomes something that any shape can have.

A teacher that met stars alone, in threes and in fours learns from the pictures that stars never come in twos, whatever
the captions say. So in a share of the scenes each shape becomes a blend of two (a weighted mean of their signed
distances), and its noun in the caption an invented one that stands for that pair. A blend that would be read as a
held-out count or colour of a shape stays undrawn, so what is held out stays unseen.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from tritflow.scenes import COLORS, SHAPES, SceneBatch
from tritflow.scenes.render import shape_distances
from tritflow.scenes.silhouettes import likeness
from tritflow.scenes.world import HELD_OUT_COLORS, HELD_OUT_COUNTS
from tritflow.training.words import InventedWords

# Nothing lies between a circle and a ring; the others fall apart half way. (Some more do at some weights.)
_UNFIT = {("circle", "ring"), ("triangle", "ring"), ("triangle", "crescent"), ("star", "crescent")}
# The pairs that are blended, by the number of the invented noun that stands for each.
PAIRS = tuple((a, b) for a, b in combinations(range(len(SHAPES)), 2) if (SHAPES[a], SHAPES[b]) not in _UNFIT)
# The second shape's weight in a blend, at least and at most, and the steps in which its reading is tabled.
LOW, HIGH, STEPS = 0.25, 0.75, 26
# A silhouette may be read as every shape that fits it this much worse than the best (IoU); with less than this share of
# it in its largest piece it is no object.
DOUBT, WHOLE = 0.1, 0.95
# Draws per scene before it keeps its own shapes.
TRIES = 8


def blend(
    scenes: SceneBatch, clip_ids: Tensor, t5_ids: Tensor, words: InventedWords, share: float, seed: int
) -> tuple[SceneBatch, Tensor, Tensor]:
    """Make every shape of `share` of the scenes a blend, and the nouns of their captions the invented ones of those.

    Objects of one shape become the same blend. Scenes with an object in front of another keep their shapes, whose
    places were chosen to be told apart.

    Args:
        scenes: as drawn from the training stream, in named shapes and colours.
        clip_ids: [N, L] token ids of the captions.
        t5_ids: [N, L].
        words: of the same tokenizers.
        share: of scenes that change, 0 to 1.
        seed: of the draw.

    Returns:
        Scenes with `other` and `mix`, and both token ids.
    """
    rng = np.random.default_rng([seed, 1])  # not the numbers that `tint` draws from the same seed
    kind = scenes.kind.numpy()
    count = len(kind)
    there = kind[..., 0] >= 0
    rows = np.arange(count)[:, None]
    shapes = np.maximum(kind[..., 0], 0)
    waiting = (rng.random(count) < share) & ~overlapping(scenes)
    # For each shape of each scene: the pair it becomes (-1: none), which end counts as first, and the weight.
    pair = np.full((count, len(SHAPES)), -1)
    mix = np.zeros((count, len(SHAPES)))
    for _ in range(TRIES):
        drawn = rng.random((count, len(PAIRS))).argsort(1)[:, : len(SHAPES)]  # never one pair for two shapes
        weight = rng.uniform(LOW, HIGH, drawn.shape)
        seen = _readings()[drawn, _step(weight)][rows, shapes] & there[..., None]
        whole = (seen.any(2) | ~there).all(1)
        fits = waiting & whole & ~_holds_held_out(seen, kind[..., 1])
        pair, mix = np.where(fits[:, None], drawn, pair), np.where(fits[:, None], weight, mix)
        waiting &= ~fits
    blended = pair[:, :1] >= 0
    ends = np.array(PAIRS)[pair[rows, shapes]]
    new = kind.copy()
    new[..., 0] = np.where(there & blended, ends[..., 0], kind[..., 0])
    choice = words.none(count)
    choice[:, : len(SHAPES)] = torch.from_numpy(np.where(blended, pair + words.nouns()[0], -1))
    batch = replace(
        scenes,
        kind=torch.from_numpy(new),
        other=torch.from_numpy(np.where(there & blended, ends[..., 1], -1)),
        mix=torch.from_numpy(np.where(there & blended, mix[rows, shapes], 0.0)).float(),
    )
    return batch, words.replace(clip_ids, "clip", choice), words.replace(t5_ids, "t5", choice)


def named(scenes: SceneBatch) -> Tensor:
    """`kind` of the scenes with shapes by the noun that names them: shapes keep their numbers, blends come after."""
    if scenes.other is None:
        return scenes.kind
    number = torch.full((len(SHAPES), len(SHAPES)), -1)
    for i, (a, b) in enumerate(PAIRS):
        number[a, b] = len(SHAPES) + i
    kind = scenes.kind.clone()
    blends = number.to(kind.device)[kind[..., 0].clamp(min=0), scenes.other.clamp(min=0)]
    kind[..., 0] = torch.where(scenes.other >= 0, blends, kind[..., 0])
    return kind


def readings(scenes: SceneBatch) -> Any:
    """Shapes that each slot may be read as: bool [N, S, shapes]; none for an empty slot."""
    kind = named(scenes).numpy()[..., 0]
    plain = kind[..., None] == np.arange(len(SHAPES))
    if scenes.other is None or scenes.mix is None:
        return plain
    table = _readings()[np.maximum(kind - len(SHAPES), 0), _step(scenes.mix.numpy())]
    return np.where((kind >= len(SHAPES))[..., None], table, plain)


def held_out_colors() -> Any:
    """Which colours each shape never has: bool [shapes, colours]."""
    held = np.zeros((len(SHAPES), len(COLORS)), dtype=bool)
    for shape, color in HELD_OUT_COLORS:
        held[SHAPES.index(shape), COLORS.index(color)] = True
    return held


def overlapping(scenes: SceneBatch) -> Any:
    """Whether any two objects of a scene come near each other: bool [N]."""
    place, there = scenes.place.numpy(), scenes.kind.numpy()[..., 0] >= 0
    near = np.zeros(len(place), dtype=bool)
    for a in range(place.shape[1]):
        for b in range(a):
            apart = np.maximum(np.abs(place[:, a, 0] - place[:, b, 0]), np.abs(place[:, a, 1] - place[:, b, 1]))
            near |= there[:, a] & there[:, b] & (apart < 0.8 * (place[:, a, 2] + place[:, b, 2]))
    return near


def _step(mix: Any) -> Any:
    """The table's row for weights of the second shape."""
    return np.rint((np.clip(mix, LOW, HIGH) - LOW) / (HIGH - LOW) * (STEPS - 1)).astype(np.int64)


@lru_cache(maxsize=1)
def _readings() -> Any:
    """Shapes that a blend may be read as: bool [pairs, STEPS, shapes]; none where it falls apart."""
    axis = (torch.arange(96) + 0.5) / 96 * 2.6 - 1.3
    distances = shape_distances(axis[None, :].expand(96, 96), axis[:, None].expand(96, 96)).numpy()
    table = np.zeros((len(PAIRS), STEPS, len(SHAPES)), dtype=bool)
    for i, (a, b) in enumerate(PAIRS):
        for step, weight in enumerate(np.linspace(LOW, HIGH, STEPS)):
            inside = (1 - weight) * distances[..., a] + weight * distances[..., b] < 0
            pieces, _ = ndimage.label(inside, structure=np.ones((3, 3)))
            if np.bincount(pieces[inside]).max() >= WHOLE * inside.sum():
                fits = likeness(inside)
                table[i, step] = fits > fits.max() - DOUBT
    return table


def _holds_held_out(seen: Any, color: Any) -> Any:
    """Whether scenes whose slots may be read as `seen` [N, S, shapes], in colours [N, S], may be read as a held-out
    combination: bool [N]."""
    colors = (seen & held_out_colors().T[np.maximum(color, 0)]).any((1, 2))
    most, least = seen.sum(1), (seen & (seen.sum(2, keepdims=True) == 1)).sum(1)
    counts = np.zeros(len(seen), dtype=bool)
    for shape, count in HELD_OUT_COUNTS:
        s = SHAPES.index(shape)
        counts |= (least[:, s] <= count) & (most[:, s] >= count)
    return colors | counts
