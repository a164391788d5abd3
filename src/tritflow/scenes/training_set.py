"""The training stream: captions with their scenes, free of every held-out combination."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from tritflow.scenes.grammar import ANYTHING, RELATION_WORDS, Clause, describe, finish
from tritflow.scenes.layout import (
    Retry,
    fill,
    pick_color,
    pick_partner,
    pick_radius,
    pick_texture,
    related,
    scatter,
    scene_of_count,
    scene_of_front,
)
from tritflow.scenes.world import (
    BACKGROUNDS,
    COLORS,
    COUNTS,
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    SHAPES,
    TEXTURES,
    Object,
    Scene,
    relation_is_held_out,
)

# Tokens of the longest training caption: the small FLUX reads 48 with the tokenizer's marks.
LONGEST_CAPTION = 45

PLACES = {
    "in the top left corner": (0.25, 0.25),
    "at the top": (0.5, 0.24),
    "in the top right corner": (0.75, 0.25),
    "on the left": (0.24, 0.5),
    "in the center": (0.5, 0.5),
    "on the right": (0.76, 0.5),
    "in the bottom left corner": (0.25, 0.75),
    "at the bottom": (0.5, 0.76),
    "in the bottom right corner": (0.75, 0.75),
}


def _train_single(rng: random.Random, ground: str) -> tuple[str, Scene]:
    shape = rng.choice(SHAPES)
    texture = pick_texture(rng)
    size = rng.choice((None, None, "small", "large"))
    told = Clause(shape, color=pick_color(rng, shape), texture=texture)
    radius = pick_radius(rng, 1, size)
    (x, y), *_ = scatter(rng, [radius])
    scene = Scene((Object(shape, str(told.color), texture, x, y, radius),), ground)
    if rng.random() < 0.5:
        told = replace(told, color=None)
    if rng.random() < 0.5:
        told = replace(told, texture=None)
    return finish(rng, describe(told, size), ground), scene


def _train_place(rng: random.Random, ground: str) -> tuple[str, Scene]:
    """Dense captions: what stands where, in words for places."""
    crowd = rng.choice((1, 2, 2, 3, 3, 4))
    places = rng.sample(sorted(PLACES), crowd)
    parts: list[str] = []
    objects: list[Object] = []
    shapes: list[str] = []
    for place in places:
        shape = rng.choice([s for s in SHAPES if not any(relation_is_held_out(o, "and", s) for o in shapes)])
        shapes.append(shape)
        if shapes.count(shape) > 1 and (shape, shapes.count(shape)) in HELD_OUT_COUNTS:
            raise Retry
        told = Clause(shape, color=pick_color(rng, shape), texture=pick_texture(rng))
        x, y = (v + rng.uniform(-0.05, 0.05) for v in PLACES[place])
        objects.append(fill(rng, told, x, y, pick_radius(rng, max(3, crowd))))
        parts.append(f"{describe(told)} {place}")
    for i, a in enumerate(objects):
        for b in objects[:i]:
            if max(abs(a.x - b.x), abs(a.y - b.y)) < (a.radius + b.radius) * 1.1 + 0.02:
                raise Retry
    if sum(len(p.split()) for p in parts) > 30:  # most of what `LONGEST_CAPTION` would refuse
        raise Retry
    body = parts[0] if crowd == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return finish(rng, body, ground), Scene(tuple(objects), ground)


def _train_list(rng: random.Random, ground: str) -> tuple[str, Scene]:
    """Two or three different shapes, with or without their colours and textures."""
    crowd = rng.choice((2, 2, 2, 3))
    shapes = [rng.choice(SHAPES)]
    while len(shapes) < crowd:
        free = [s for s in SHAPES if s not in shapes and not any(relation_is_held_out(o, "and", s) for o in shapes)]
        if not free:
            raise Retry
        shapes.append(rng.choice(free))
    with_color, with_texture = rng.random() < 0.65, rng.random() < 0.3
    told = [
        Clause(
            s,
            color=pick_color(rng, s) if with_color else None,
            texture=pick_texture(rng, 0.4) if with_texture else None,
        )
        for s in shapes
    ]
    radii = [pick_radius(rng, crowd) for _ in told]
    objects = [fill(rng, c, x, y, r) for c, (x, y), r in zip(told, scatter(rng, radii), radii, strict=True)]
    parts = [describe(c) for c in told]
    body = ", ".join(parts[:-1]) + " and " + parts[-1]
    return finish(rng, body, ground), Scene(tuple(objects), ground)


def _train_count(rng: random.Random, ground: str) -> tuple[str, Scene]:
    shape, count = rng.choice([(s, n) for s in SHAPES for n in COUNTS if (s, n) not in HELD_OUT_COUNTS])
    with_color, with_texture = rng.random() < 0.55, rng.random() < 0.15
    told = Clause(
        shape,
        count,
        color=pick_color(rng, shape) if with_color else None,
        texture=pick_texture(rng, 0.0) if with_texture else None,
    )
    return finish(rng, describe(told), ground), scene_of_count(rng, told, ground)


def _train_anything(rng: random.Random, ground: str) -> tuple[str, Scene]:
    """One to four objects whose shapes the caption leaves open and which differ: a number, a colour or a texture is
    the same thing whatever it is said of."""
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    color = rng.choice((None, *COLORS))
    texture = rng.choice((None, None, *TEXTURES[1:]))
    told = Clause(rng.choice(tuple(ANYTHING)), count, color=color, texture=texture)
    radii = [pick_radius(rng, count) for _ in range(count)]
    objects = []
    for (x, y), r in zip(scatter(rng, radii), radii, strict=True):
        shape = rng.choice([s for s in SHAPES if (s, color) not in HELD_OUT_COLORS])
        objects.append(fill(rng, replace(told, shape=shape), x, y, r))
    return finish(rng, describe(told), ground), Scene(tuple(objects), ground)


def _train_relation(rng: random.Random, ground: str) -> tuple[str, Scene]:
    relation = rng.choice(("left of", "right of", "above", "below"))
    a = rng.choice(SHAPES)
    b = pick_partner(rng, a)
    if relation_is_held_out(a, relation, b):
        raise Retry
    with_color = rng.random() < 0.5
    told = [Clause(s, color=pick_color(rng, s) if with_color else None) for s in (a, b)]
    ra, rb = pick_radius(rng, 2), pick_radius(rng, 2)
    (ax, ay), (bx, by) = related(rng, relation, ra, rb)
    scene = Scene((fill(rng, told[0], ax, ay, ra), fill(rng, told[1], bx, by, rb)), ground)
    body = f"{describe(told[0])} {rng.choice(RELATION_WORDS[relation])} {describe(told[1])}"
    return finish(rng, body, ground), scene


def _train_front(rng: random.Random, ground: str) -> tuple[str, Scene]:
    a = rng.choice(SHAPES)
    b = pick_partner(rng, a)
    if relation_is_held_out(a, "in front of", b):
        raise Retry
    told = [Clause(s, color=pick_color(rng, s)) for s in (a, b)]
    return finish(rng, f"{describe(told[0])} in front of {describe(told[1])}", ground), scene_of_front(
        rng, told[0], told[1], ground
    )


# What kinds of scenes there are, and the share of each.
_TRAINING: dict[str, tuple[float, Callable[[random.Random, str], tuple[str, Scene]]]] = {
    "single": (0.10, _train_single),
    "place": (0.16, _train_place),
    "list": (0.22, _train_list),
    "count": (0.18, _train_count),
    "anything": (0.06, _train_anything),
    "relation": (0.20, _train_relation),
    "front": (0.08, _train_front),
}
KINDS = tuple(_TRAINING)


def training_examples(seed: int, kinds: tuple[str, ...] = KINDS) -> Iterator[tuple[str, Scene]]:
    """An endless stream of (caption, scene), free of every held-out combination; the same for the same seed and
    `kinds` of scenes, in the shares of the whole."""
    rng = random.Random(f"training-{seed}")
    weights = [_TRAINING[k][0] for k in kinds]
    makers = [_TRAINING[k][1] for k in kinds]
    while True:
        maker = rng.choices(makers, weights)[0]
        ground = rng.choice(BACKGROUNDS)
        try:
            caption, scene = maker(rng, ground)
        except Retry:
            continue
        if scene_is_allowed(scene) and caption_tokens(caption) <= LONGEST_CAPTION:
            yield caption, scene


def caption_tokens(caption: str) -> int:
    """Words and commas: tokens of a word-level tokenizer, without its marks of beginning and end."""
    return len(caption.split()) + caption.count(",")


def training_captions(n: int, seed: int = 0) -> list[str]:
    """`n` training captions: the prompts that calibration and distillation of the small FLUX may use."""
    stream = training_examples(seed)
    return [next(stream)[0] for _ in range(n)]


def scene_is_allowed(scene: Scene) -> bool:
    """Whether a scene is free of held-out shape-colour and shape-count combinations."""
    shapes = [o.shape for o in scene.objects]
    return all((o.shape, o.color) not in HELD_OUT_COLORS for o in scene.objects) and all(
        (s, shapes.count(s)) not in HELD_OUT_COUNTS for s in shapes
    )
