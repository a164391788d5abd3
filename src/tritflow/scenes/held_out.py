"""Evaluation prompts: each holds a combination (or, for single objects, a phrasing) that no training scene had."""

from __future__ import annotations

import random
from dataclasses import replace

from tritflow.scenes.grammar import (
    HELD_OUT_OPENINGS,
    OPENINGS,
    RELATION_WORDS,
    TAGS,
    Clause,
    Prompt,
    describe,
    finish,
    groups_in,
)
from tritflow.scenes.layout import (
    Retry,
    fill,
    hue_gap,
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
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_RELATIONS,
    SHAPES,
    Scene,
)

_INVERSE = {"left of": "right of", "above": "below"}


def evaluation_prompts(per_tag: int, seed: int = 0, tags: tuple[str, ...] = TAGS) -> list[Prompt]:
    """`per_tag` different prompts for each tag, tag after tag; the same for the same seed.

    Raises:
        ValueError: an unknown tag, or more prompts than the grammar has for a tag.
    """
    prompts: list[Prompt] = []
    for tag in tags:
        if tag not in _MAKERS:
            raise ValueError(f"no tag '{tag}' in the scenes suite; there are {', '.join(TAGS)}")
        rng = random.Random(f"evaluation-{seed}-{tag}")
        seen: set[str] = set()
        for _ in range(200 * per_tag):
            if len(seen) == per_tag:
                break
            try:
                body, include, held_out = _MAKERS[tag](rng)
            except Retry:
                continue
            openings = HELD_OUT_OPENINGS if tag == "single_object" else OPENINGS
            text = finish(rng, body, rng.choice(BACKGROUNDS), openings)
            if tag == "single_object":
                held_out = "a phrasing never trained"
            if text not in seen:
                seen.add(text)
                prompts.append(Prompt(tag, text, include, held_out))
        if len(seen) < per_tag:
            raise ValueError(f"the grammar has fewer than {per_tag} prompts for '{tag}' (found {len(seen)})")
    return prompts


_Made = tuple[str, tuple[Clause, ...], str]


def _single(rng: random.Random) -> _Made:
    shape = rng.choice(SHAPES)
    told = Clause(shape, texture=pick_texture(rng, 0.4), color=rng.choice([None, pick_color(rng, shape)]))
    size = rng.choice((None, None, "small", "large"))
    # Only the shape is judged here, as in GenEval; colour and texture have tags of their own.
    return describe(told, size), (Clause(shape),), ""


def _two(rng: random.Random) -> _Made:
    a, _, b = rng.choice(sorted(t for t in HELD_OUT_RELATIONS if t[1] == "and"))
    textured = rng.random() < 0.3
    told = [
        Clause(
            s,
            texture=pick_texture(rng, 0.0) if textured else None,
            color=rng.choice([None, pick_color(rng, s)]),
        )
        for s in (a, b)
    ]
    return f"{describe(told[0])} and {describe(told[1])}", (Clause(a), Clause(b)), f"{a} and {b}"


def _counting(rng: random.Random) -> _Made:
    shape, count = rng.choice(sorted(HELD_OUT_COUNTS))
    told = Clause(shape, count, color=rng.choice([None, pick_color(rng, shape)]))
    return describe(told), (Clause(shape, count),), f"{count} x {shape}"


def _colors(rng: random.Random) -> _Made:
    shape, color = rng.choice(sorted(HELD_OUT_COLORS))
    told = Clause(shape, color=color, texture=pick_texture(rng, 0.5))
    size = rng.choice((None, None, "small", "large"))
    return describe(told, size), (Clause(shape, color=color),), f"{color} {shape}"


def _position(rng: random.Random) -> _Made:
    a, relation, b = rng.choice(sorted(t for t in HELD_OUT_RELATIONS if t[1] in ("left of", "above")))
    held_out = f"{a} {relation} {b}"
    if rng.random() < 0.5:
        a, relation, b = b, _INVERSE[relation], a
    colored = rng.random() < 0.5
    told = [Clause(s, color=pick_color(rng, s) if colored else None) for s in (a, b)]
    body = f"{describe(told[0])} {rng.choice(RELATION_WORDS[relation])} {describe(told[1])}"
    return body, (Clause(a, relation=relation, target=1), Clause(b)), held_out


def _color_attr(rng: random.Random) -> _Made:
    a, color_a = rng.choice(sorted(HELD_OUT_COLORS))
    b = pick_partner(rng, a)
    told = [Clause(a, color=color_a), Clause(b, color=rng.choice([c for c in COLORS if c != color_a]))]
    rng.shuffle(told)
    return f"{describe(told[0])} and {describe(told[1])}", tuple(told), f"{color_a} {a}"


def _texture(rng: random.Random) -> _Made:
    shape, color = rng.choice(sorted(HELD_OUT_COLORS))
    told = Clause(shape, texture=pick_texture(rng, 0.0), color=color)
    size = rng.choice((None, None, "small", "large"))
    return describe(told, size), (replace(told, color=None),), f"{color} {shape}"


def _occlusion(rng: random.Random) -> _Made:
    a, relation, b = rng.choice(sorted(t for t in HELD_OUT_RELATIONS if t[1] == "in front of"))
    color_a, color_b = pick_color(rng, a), pick_color(rng, b)
    if hue_gap(color_a, color_b) < 2:
        raise Retry
    told = (Clause(a, color=color_a, relation=relation, target=1), Clause(b, color=color_b))
    return f"{describe(told[0])} in front of {describe(told[1])}", told, f"{a} {relation} {b}"


_MAKERS = {
    "single_object": _single,
    "two_object": _two,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
    "texture": _texture,
    "occlusion": _occlusion,
}


def scene_of(prompt: Prompt, seed: int = 0) -> Scene:
    """A true picture of an evaluation prompt: what is judged and whatever else its text says, size, colours and ground
    included. The detector is proven on these.

    Raises:
        ValueError: the scene has no room for what the prompt asks for.
    """
    rng = random.Random(f"scene-{seed}-{prompt.text}")
    ground = next((b for b in BACKGROUNDS if prompt.text.endswith((f"{b} background", f"on {b}"))), None)
    clauses, size = list(prompt.include), None
    named = groups_in(prompt.text)
    if [(c.shape, c.count) for c, _ in named] == [(c.shape, c.count) for c in clauses]:
        clauses = [
            replace(c, color=c.color or t.color, texture=c.texture or t.texture)
            for c, (t, _) in zip(clauses, named, strict=True)
        ]
        size = named[0][1]
    for _ in range(500):
        try:
            return _draw(rng, clauses, size, ground or rng.choice(BACKGROUNDS))
        except Retry:
            continue
    raise ValueError(f"found no room for '{prompt.text}'")


def _draw(rng: random.Random, clauses: list[Clause], size: str | None, ground: str) -> Scene:
    first = clauses[0]
    if first.count > 1:
        return scene_of_count(rng, first, ground)
    if first.relation == "in front of":
        return scene_of_front(rng, first, clauses[1], ground)
    if first.relation is not None:
        second = clauses[1]
        ra, rb = pick_radius(rng, 2), pick_radius(rng, 2)
        (ax, ay), (bx, by) = related(rng, first.relation, ra, rb)
        return Scene((fill(rng, first, ax, ay, ra), fill(rng, second, bx, by, rb)), ground)
    radii = [pick_radius(rng, len(clauses), size) for _ in clauses]
    places = scatter(rng, radii)
    return Scene(
        tuple(fill(rng, c, x, y, r) for c, (x, y), r in zip(clauses, places, radii, strict=True)),
        ground,
    )
