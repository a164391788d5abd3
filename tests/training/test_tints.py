import itertools

import pytest
import torch

from tritflow.scenes import COLORS, SHAPES, SceneBatch, detect, render, training_examples
from tritflow.scenes.render import hue, palette, turned
from tritflow.scenes.world import HELD_OUT_COLORS
from tritflow.training.data import Mixture, example_chunk, invented_words, make_examples, tokenize, word_tokenizers
from tritflow.training.reading import Reader
from tritflow.training.tints import tint


@pytest.fixture(scope="module")
def made():
    pairs = list(itertools.islice(training_examples(7), 400))
    clip, t5 = tokenize([c for c, _ in pairs], *word_tokenizers())
    before = SceneBatch.from_scenes([s for _, s in pairs])
    return before, t5, tint(before, clip, t5, invented_words(), 0.5, seed=3)


def test_half_of_the_scenes_change_and_front_ones_never(made):
    before, _, (after, _, _) = made
    changed = (after.turn.abs().sum(1) > 0) | (after.kind != before.kind).flatten(1).any(1)
    assert 0.35 < changed.float().mean() < 0.55
    place, there = before.place, before.kind[..., 0] >= 0
    near = torch.zeros(len(place), dtype=torch.bool)
    for a, b in itertools.combinations(range(4), 2):
        apart = (place[:, a, :2] - place[:, b, :2]).abs().amax(1)
        near |= there[:, a] & there[:, b] & (apart < 0.5 * (place[:, a, 2] + place[:, b, 2]))
    assert near.any()
    assert not (near & changed).any()


def test_no_held_out_colour_is_drawn(made):
    _, _, (after, _, _) = made
    tinted = (after.turn.abs().sum(1) > 0).nonzero()[:150, 0]
    pixels = (render(after[tinted], 128) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    seen = {(d.shape, d.color) for picture in pixels for d in detect(picture)}
    assert len(seen) > 25
    assert not seen & HELD_OUT_COLORS
    named = {(SHAPES[s], COLORS[c]) for s, c, _ in after.kind.flatten(0, 1).tolist() if s >= 0}
    assert not named & HELD_OUT_COLORS


def test_objects_of_one_colour_stay_of_one_colour(made):
    before, _, (after, _, _) = made
    there = before.kind[..., 0] >= 0
    for row in range(len(before)):
        told = before.kind[row, there[row], 1].tolist()
        hues = [round(t, 5) for t in after.turn[row, there[row]].tolist()]
        now = list(zip(after.kind[row, there[row], 1].tolist(), hues, strict=True))
        assert len(set(zip(told, now, strict=True))) == len(set(told))


def test_tinted_words_are_invented_ones_that_name_the_hue(made):
    _, plain, (after, _, t5_ids) = made
    reader = Reader(8, 8, word_tokenizers())
    first, many = invented_words().colors()
    ids = invented_words().t5_invented[first : first + many]
    changed = (plain != t5_ids).any(1)
    assert changed.any()
    hues = hue(palette())
    checked = 0
    for row in changed.nonzero()[:, 0].tolist():
        words = [int((ids == i).nonzero()[0, 0]) for i in t5_ids[row].tolist() if (ids == i).any()]
        drawn = {
            int((float(hues[c]) + float(t)) % 1 * many)
            for (s, c, _), t in zip(after.kind[row].tolist(), after.turn[row].tolist(), strict=True)
            if s >= 0
        }
        assert set(words) <= drawn
        checked += len(words)
        told = reader.colors[t5_ids[row]]
        assert {w + len(COLORS) for w in words} <= set(told.tolist())
    assert checked > 50


def test_turning_moves_the_hue_by_the_angle_and_keeps_the_brightness():
    colors = palette()
    for turn in (-0.06, 0.02, 0.3):
        new = turned(colors, torch.full((8,), turn))
        assert torch.allclose(new.mean(-1), colors.mean(-1), atol=1e-5)
        assert (new >= -1e-6).all()
        assert (new <= 1 + 1e-6).all()
        apart = (hue(new) - hue(colors) - turn + 0.5) % 1 - 0.5
        assert apart.abs().max() < 1e-4
    assert torch.allclose(turned(colors, torch.zeros(8)), colors, atol=1e-6)


def test_chunks_are_the_same_whoever_makes_them():
    one, two = example_chunk((2, 0, 64, Mixture(0.4))), make_examples(64, seed=2, workers=1, mixture=Mixture(0.4))
    assert torch.equal(one.scenes.turn, two.scenes.turn)
    assert torch.equal(one.t5_ids, two.t5_ids)
    assert make_examples(8, seed=2, workers=1).scenes.turn is None
