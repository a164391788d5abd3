"""Words: what is held out stays out, whoever asks and whenever."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest

from tritflow.scenes import (
    COLORS,
    SHAPES,
    TAGS,
    TEXTURES,
    Clause,
    Prompt,
    evaluation_prompts,
    held_out,
    scene_of,
    training_captions,
    training_examples,
)
from tritflow.scenes.grammar import HELD_OUT_OPENINGS, NUMBER, WORDS, groups_in
from tritflow.scenes.training_set import LONGEST_CAPTION, caption_tokens
from tritflow.scenes.world import (
    COUNTS,
    HELD_OUT_COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_RELATIONS,
    SIZES,
    Object,
    relation_is_held_out,
)

EXAMPLES = 5000
SIDES = {
    **dict.fromkeys(("left of", "to the left of", "on the left of"), "left of"),
    **dict.fromkeys(("right of", "to the right of", "on the right of"), "right of"),
    **dict.fromkeys(("above", "over"), "above"),
    **dict.fromkeys(("below", "under"), "below"),
    "in front of": "in front of",
}


@pytest.fixture(scope="module")
def examples():  # type: ignore[no-untyped-def]
    return list(itertools.islice(training_examples(11), EXAMPLES))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return evaluation_prompts(60, seed=5)


def test_at_least_a_fifth_is_held_out() -> None:
    assert len(HELD_OUT_COLORS) >= 0.2 * len(SHAPES) * len(COLORS)
    assert len(HELD_OUT_COUNTS) >= 0.2 * len(SHAPES) * len(COUNTS)
    assert len(HELD_OUT_RELATIONS) >= 0.2 * 4 * len(SHAPES) * (len(SHAPES) - 1)
    assert {r for _, r, _ in HELD_OUT_RELATIONS} == {"left of", "above", "in front of", "and"}


def test_no_training_scene_holds_a_held_out_combination(examples) -> None:  # type: ignore[no-untyped-def]
    for caption, scene in examples:
        shapes = [o.shape for o in scene.objects]
        for o in scene.objects:
            assert (o.shape, o.color) not in HELD_OUT_COLORS, caption
            assert (o.shape, shapes.count(o.shape)) not in HELD_OUT_COUNTS, caption


def test_no_training_caption_tells_a_held_out_relation(examples) -> None:  # type: ignore[no-untyped-def]
    told = listed = 0
    for caption, _ in examples:
        groups = groups_in(caption)
        if len(groups) > 1 and not any(f" {words} a" in caption for words in SIDES):
            listed += 1
            for (a, _), (b, _) in itertools.combinations(groups, 2):
                assert not relation_is_held_out(a.shape, "and", b.shape), caption
        for words, relation in SIDES.items():
            # "a star above a red ring": the relation stands between two descriptions, not before a place.
            if f" {words} a" in caption and len(groups) == 2:
                told += 1
                assert not relation_is_held_out(groups[0][0].shape, relation, groups[1][0].shape), caption
                break
    assert told > EXAMPLES / 6
    assert listed > EXAMPLES / 6


def test_training_never_uses_the_phrasings_of_single_object_prompts(examples) -> None:  # type: ignore[no-untyped-def]
    starts = [o.split("{}")[0] for o in HELD_OUT_OPENINGS if not o.startswith("there is")]
    for caption, _ in examples:
        assert not caption.startswith(tuple(starts)), caption
        assert "in this image" not in caption
    for prompt in evaluation_prompts(40, tags=("single_object",)):
        assert prompt.text.startswith(tuple(starts)) or "in this image" in prompt.text


def test_training_captions_fit_the_tokenizers(examples) -> None:  # type: ignore[no-untyped-def]
    assert max(caption_tokens(c) for c, _ in examples) <= LONGEST_CAPTION
    assert caption_tokens("a red star, a ring and a blue heart") == 10


def _obeys_open_caption(caption: str, thing: Object) -> bool:
    """Whether an object has the colour and texture that "two striped red shapes" asks for."""
    words = caption.split()
    return all(thing.color == c for c in COLORS if c in words) and all(
        thing.texture == t for t in TEXTURES if t in words
    )


def test_training_captions_tell_the_truth(examples) -> None:  # type: ignore[no-untyped-def]
    for caption, scene in examples[:1000]:
        groups = groups_in(caption)
        if groups:
            assert sum(c.count for c, _ in groups) == len(scene.objects), caption
        else:
            assert sum(_obeys_open_caption(caption, o) for o in scene.objects) == len(scene.objects), caption
            many = next((n for n, name in NUMBER.items() if name in caption.split()), 1)
            assert many == len(scene.objects), caption
        for clause, _ in groups:
            fitting = [
                o
                for o in scene.objects
                if o.shape == clause.shape and clause.color in (None, o.color) and clause.texture in (None, o.texture)
            ]
            assert len(fitting) >= clause.count, caption


def test_the_vocabulary_is_closed(examples, prompts: list[Prompt]) -> None:  # type: ignore[no-untyped-def]
    known = {w for c, _ in examples for w in c.replace(",", " ").split()}
    asked = {w for p in prompts for w in p.text.replace(",", " ").split()}
    assert asked <= known
    assert {*SHAPES, *COLORS, *TEXTURES[1:]} <= known


def test_every_prompt_holds_its_combination(prompts: list[Prompt]) -> None:
    colors = {f"{c} {s}" for s, c in HELD_OUT_COLORS}
    counts = {f"{n} x {s}" for s, n in HELD_OUT_COUNTS}
    assert [p.tag for p in prompts] == [t for t in TAGS for _ in range(60)]
    assert len({p.text for p in prompts}) > 0.95 * len(prompts)
    for p in prompts:
        first = p.include[0]
        match p.tag:
            case "single_object":
                assert p.held_out == "a phrasing never trained"
            case "two_object":
                assert (first.shape, "and", p.include[1].shape) in HELD_OUT_RELATIONS
            case "counting":
                assert p.held_out in counts
                assert (first.shape, first.count) in HELD_OUT_COUNTS
            case "colors":
                assert p.held_out in colors
                assert (first.shape, first.color) in HELD_OUT_COLORS
            case "color_attr":
                assert p.held_out in colors
                assert any((c.shape, c.color) in HELD_OUT_COLORS for c in p.include)
            case "texture":
                assert p.held_out in colors
                assert first.texture in TEXTURES[1:]
                assert p.held_out.split()[0] in p.text.split()
            case _:
                assert relation_is_held_out(first.shape, str(first.relation), p.include[1].shape)


def test_groups_are_read_from_the_text() -> None:
    assert groups_in("a simple picture showing a small checkered red star on a gray background") == (
        (Clause("star", 1, "red", "checkered"), "small"),
    )
    assert groups_in("three pink crosses") == ((Clause("cross", 3, "pink"), None),)
    assert groups_in("an orange ring in front of a striped heart") == (
        (Clause("ring", 1, "orange"), None),
        (Clause("heart", 1, None, "striped"), None),
    )
    assert groups_in("nothing of this world") == ()


def test_true_scenes_obey_the_whole_text(prompts: list[Prompt]) -> None:
    sized = 0
    for p in prompts:
        scene, groups = scene_of(p, 3), groups_in(p.text)
        assert [(c.shape, c.count) for c, _ in groups] == [(c.shape, c.count) for c in p.include]
        for clause, size in groups:
            own = [o for o in scene.objects if o.shape == clause.shape]
            assert len(own) == clause.count
            for o in own:
                assert clause.color in (None, o.color), p.text
                assert clause.texture in (None, o.texture), p.text
                if size is not None:
                    sized += 1
                    assert SIZES[size][0] <= o.radius <= SIZES[size][1], p.text
        for ground in ("white", "gray", "black"):
            if f"{ground} background" in p.text or p.text.endswith(f"on {ground}"):
                assert scene.background == ground
    assert sized > 20


def test_another_process_makes_the_same_words() -> None:
    code = (
        "import hashlib; from tritflow.scenes import *;"
        "p = [(p.text, str(p.include), str(scene_of(p, 1))) for p in evaluation_prompts(5, 9)];"
        "print(hashlib.sha256(repr((p, training_captions(300, 4))).encode()).hexdigest())"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONHASHSEED": s, "OMP_NUM_THREADS": "1"},
        ).stdout
        for s in ("1", "2")
    }
    assert len(seen) == 1
    assert training_captions(20, 4) != training_captions(20, 5)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no tag 'size'"):
        evaluation_prompts(1, tags=("size",))
    monkeypatch.setitem(held_out._MAKERS, "texture", lambda rng: ("a ring", (Clause("ring"),), ""))
    with pytest.raises(ValueError, match="fewer than 150 prompts for 'texture'"):
        evaluation_prompts(150, tags=("texture",))


def test_every_word_of_the_captions_is_known_and_none_besides() -> None:
    found = {w for c in training_captions(4000) for w in c.replace(",", " ").split()}
    assert sorted(found) == list(WORDS)
    assert {w for p in evaluation_prompts(40) for w in p.text.replace(",", " ").split()} <= found
