"""Words: how clauses become captions. Many phrasings, one vocabulary."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tritflow.scenes.world import COLORS, SHAPES, SIZES, TEXTURES

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
TAGS = (*GENEVAL_TAGS, "texture", "occlusion")

PLURAL = {s: s + "s" for s in SHAPES} | {"cross": "crosses"}
_SINGULAR = {plural: shape for shape, plural in PLURAL.items()}
NUMBER = {2: "two", 3: "three", 4: "four"}
# Words for an object whose shape is left open, one and many. They are no shapes: `groups_in` does not read them.
ANYTHING = {"shape": "shapes", "object": "objects"}
_MANY = PLURAL | ANYTHING
_ADJECTIVES = {"count": tuple(NUMBER.values()), "size": tuple(SIZES), "color": COLORS, "texture": TEXTURES}
RELATION_WORDS = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "in front of": ("in front of",),
}

OPENINGS = (
    "{}",
    "{}",
    "a photo of {}",
    "a picture of {}",
    "a drawing of {}",
    "an image of {}",
    "a simple picture showing {}",
    "there is {}",
    "this is {}",
    "a scene with {}",
    "we see {}",
)
# Words all occur in training; these orders of them never do. Single-object evaluation prompts use only these.
HELD_OUT_OPENINGS = (
    "a drawing showing {}",
    "a simple photo of {}",
    "this picture is showing {}",
    "a simple scene with {}",
    "we see a picture of {}",
    "this is a drawing of {}",
    "there is {} in this image",
    "an image showing {}",
)
GROUND_WORDS = ("on a {} background", "on {}", "with a {} background")
_WORDS = """
a above an and at background below black blue bottom center checkered circle circles corner crescent crescents
cross crosses cyan drawing four front gray green heart hearts image in is large left object objects of on orange
over photo picture pink purple red right ring rings scene see shape shapes showing simple small square squares star
stars striped the there this three to top triangle triangles two under we white with yellow
"""
# Every word that training captions use, sorted: a token each of the small FLUX's tokenizers, so that their order is the
# weights'.
WORDS = tuple(_WORDS.split())


@dataclass(frozen=True)
class Clause:
    """What a prompt asks for: `count` objects of a shape, of a colour and texture if named, standing in `relation`
    to the objects of clause number `target`."""

    shape: str
    count: int = 1
    color: str | None = None
    texture: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class Prompt:
    """An evaluation prompt: its tag, its text, what must be seen, and the held-out combination that it contains."""

    tag: str
    text: str
    include: tuple[Clause, ...]
    held_out: str


def groups_in(text: str) -> tuple[tuple[Clause, str | None], ...]:
    """Every object group that a text of this grammar names, in order, with its size word; relations are left out.

    A prompt's `include` holds what is judged; a true picture obeys the rest of the text, too.
    """
    found: list[tuple[Clause, str | None]] = []
    seen: dict[str, str] = {}
    for word in text.replace(",", " ").split():
        shape = _SINGULAR.get(word, word)
        if shape in SHAPES:
            count = next((n for n, name in NUMBER.items() if name == seen.get("count")), 1)
            found.append((Clause(shape, count, seen.get("color"), seen.get("texture")), seen.get("size")))
            seen = {}
        for kind, words in _ADJECTIVES.items():
            if word in words:
                seen[kind] = word
    return tuple(found)


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def describe(clause: Clause, size: str | None = None) -> str:
    words = [w for w in (size, clause.texture, clause.color) if w and w != "solid"]
    if clause.count == 1:
        return _article(" ".join([*words, clause.shape]))
    return " ".join([NUMBER[clause.count], *words, _MANY[clause.shape]])


def finish(rng: random.Random, body: str, ground: str, openings: tuple[str, ...] = OPENINGS, p: float = 0.35) -> str:
    text = rng.choice(openings).format(body)
    if rng.random() < p:
        text += " " + rng.choice(GROUND_WORDS).format(ground)
    return text
