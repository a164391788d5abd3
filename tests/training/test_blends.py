"""Shapes between the shapes: drawn whole and sharp, told in invented nouns, and never read as what is held out."""

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from tritflow.scenes import SHAPES, SceneBatch, detect, render, training_examples
from tritflow.scenes.render import shape_distances
from tritflow.scenes.rules import MIN_SCORE
from tritflow.scenes.world import HELD_OUT_COLORS, HELD_OUT_COUNTS
from tritflow.training import data
from tritflow.training.blends import HIGH, LOW, PAIRS, blend, named, readings
from tritflow.training.data import Mixture, example_chunk, invented_words, make_examples, word_tokenizers
from tritflow.training.patches import PatchHead
from tritflow.training.reading import Reader, named_objects
from tritflow.training.words import CLASSES


@pytest.fixture(scope="module")
def made():
    pairs = list(itertools.islice(training_examples(9), 600))
    clip, t5 = data.tokenize([c for c, _ in pairs], *word_tokenizers())
    before = SceneBatch.from_scenes([s for _, s in pairs])
    return before, (clip, t5), blend(before, clip, t5, invented_words(), 0.6, seed=4)


def blended(scenes):
    return (scenes.other >= 0).any(1)


def test_every_invented_noun_has_a_pair(made):
    assert len(PAIRS) == len(set(PAIRS)) == len(CLASSES[0][1])
    used = named(made[2][0])[..., 0]
    assert set(used[used >= len(SHAPES)].tolist()) == set(range(len(SHAPES), len(SHAPES) + len(PAIRS)))


def test_blends_stay_in_one_piece(made):
    _, _, (after, _, _) = made
    slots = (after.other >= 0).nonzero()[:400]
    axis = (torch.arange(128) + 0.5) / 128 * 2.6 - 1.3
    distances = shape_distances(axis[None].expand(128, 128), axis[:, None].expand(128, 128))
    assert len(slots) > 300
    for row, slot in slots.tolist():
        a, b, mix = after.kind[row, slot, 0], after.other[row, slot], float(after.mix[row, slot])
        assert LOW <= mix <= HIGH
        inside = (torch.lerp(distances[..., a], distances[..., b], mix) < 0).numpy()
        pieces, _ = ndimage.label(inside, structure=np.ones((3, 3)))
        assert np.bincount(pieces[inside]).max() > 0.9 * inside.sum(), (SHAPES[a], SHAPES[b], mix)


def test_a_share_changes_all_its_shapes_and_front_ones_never(made):
    before, _, (after, _, _) = made
    changed, there = blended(after), before.kind[..., 0] >= 0
    assert 0.4 < changed.float().mean() < 0.6
    assert torch.equal(after.other >= 0, there & changed[:, None])
    place = before.place
    near = torch.zeros(len(place), dtype=torch.bool)
    for a, b in itertools.combinations(range(4), 2):
        apart = (place[:, a, :2] - place[:, b, :2]).abs().amax(1)
        near |= there[:, a] & there[:, b] & (apart < 0.5 * (place[:, a, 2] + place[:, b, 2]))
    assert near.any()
    assert not (near & changed).any()
    assert torch.equal(after.kind[~changed], before.kind[~changed])
    assert torch.equal(after.kind[..., 1:], before.kind[..., 1:])


def test_objects_of_one_shape_become_one_blend(made):
    before, _, (after, _, _) = made
    kind = named(after)
    for row in blended(after).nonzero()[:, 0].tolist():
        there = before.kind[row, :, 0] >= 0
        told = before.kind[row, there, 0].tolist()
        now = list(zip(kind[row, there, 0].tolist(), after.mix[row, there].tolist(), strict=True))
        assert len(set(zip(told, now, strict=True))) == len(set(told)) == len({k for k, _ in now})
        assert min(k for k, _ in now) >= len(SHAPES)


def test_captions_name_the_blends(made):
    _, _, (after, clip_ids, t5_ids) = made
    reader = Reader(8, 8, word_tokenizers())
    nouns, _, _ = reader.told(t5_ids)
    slots, many = named_objects(nouns, named(after))
    told = nouns >= 0
    assert bool((many[told] > 0).all())
    assert torch.equal(named(after).gather(1, slots[..., None].expand(-1, -1, 3))[..., 0][told], nouns[told])
    some = told.any(1)
    assert torch.equal((nouns >= len(SHAPES)).any(1)[some], blended(after)[some])
    invented = invented_words()
    for row in blended(after).nonzero()[:20, 0].tolist():
        said = [int(n) - len(SHAPES) for n in nouns[row][told[row]]]
        heard = [
            int((invented.clip_invented == i).nonzero()) for i in clip_ids[row] if (invented.clip_invented == i).any()
        ]
        assert heard == said


def test_what_is_held_out_is_not_to_be_seen(made):
    _, _, (after, _, _) = made
    rows = blended(after).nonzero()[:250, 0]
    pixels = (render(after[rows], 128) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    colors, counts = set(), set()
    for picture in pixels:
        seen = [d for d in detect(picture) if d.score >= MIN_SCORE]
        colors |= {(d.shape, d.color) for d in seen}
        counts |= set(Counter(d.shape for d in seen).items())
    assert len(colors) > 25
    assert {n for _, n in counts} >= {1, 2, 3, 4}
    assert not colors & HELD_OUT_COLORS
    assert not counts & HELD_OUT_COUNTS


def test_the_rule_refuses_held_out_readings(made, monkeypatch):
    before, ids, _ = made
    everything = blend(before, *ids, invented_words(), 1.0, seed=4)[0]
    monkeypatch.setattr("tritflow.training.blends._holds_held_out", lambda seen, color: np.zeros(len(seen), dtype=bool))
    free = blend(before, *ids, invented_words(), 1.0, seed=4)[0]
    counts = readings(free).sum(1)
    broken = sum(int((counts[:, SHAPES.index(s)] == n).sum()) for s, n in HELD_OUT_COUNTS)
    assert broken > 20  # so without the rule the test above could fail
    counts = readings(everything).sum(1)
    assert sum(int((counts[:, SHAPES.index(s)] == n).sum()) for s, n in HELD_OUT_COUNTS) == 0


def test_a_blend_lies_between_its_shapes_and_has_their_sharp_edges():
    circle, star = SHAPES.index("circle"), SHAPES.index("star")
    kind = torch.full((3, 4, 3), -1)
    kind[:, 0] = torch.tensor([[circle, 0, 0], [circle, 0, 0], [star, 0, 0]])
    place = torch.zeros(3, 4, 3)
    place[:, 0] = torch.tensor([0.5, 0.5, 0.35])
    other, mix = torch.full((3, 4), -1), torch.zeros(3, 4)
    other[1, 0], mix[1, 0] = star, 0.5
    scenes = SceneBatch(kind, place, torch.full((3,), 0.95), other=other, mix=mix)
    pictures = render(scenes, 128)
    cover = (0.95 - pictures[:, 1]) / (0.95 - 0.10)
    areas = cover.sum((1, 2))
    assert areas[0] > 1.15 * areas[1] > 1.3 * areas[2]
    # Pixels that are neither inside nor outside lie along the outline alone.
    partly = ((cover > 0.05) & (cover < 0.95)).sum((1, 2)).float()
    assert partly[1] < 1.3 * partly[2]
    plain = render(replace(scenes, other=None, mix=None), 128)
    assert torch.equal(plain[[0, 2]], pictures[[0, 2]])


def test_chunks_hold_the_shares_that_were_asked_for():
    mixture = Mixture(tinted=0.4, blended=0.4, overlapping=0.25)
    chunk = example_chunk((2, 0, 400, mixture))
    again = make_examples(400, seed=2, workers=1, mixture=mixture)
    for name in ("kind", "place", "ground", "turn", "other", "mix"):
        assert torch.equal(getattr(chunk.scenes, name), getattr(again.scenes, name))
    assert torch.equal(chunk.t5_ids, again.t5_ids)
    both = blended(chunk.scenes) & (chunk.scenes.turn.abs().sum(1) > 0)
    assert 0.05 < both.float().mean() < 0.25
    assert 0.3 < blended(chunk.scenes).float().mean() < 0.42
    plain = example_chunk((2, 0, 400, Mixture()))
    assert plain.scenes.other is None
    assert plain.scenes.turn is None


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_a_share_of_the_blends_is_counted(share):
    two, three, four = (word_tokenizers()[1].convert_tokens_to_ids(f"▁{n}") for n in ("two", "three", "four"))

    def counted(examples):
        return torch.isin(examples.t5_ids.long(), torch.tensor([two, three, four])).any(1)

    mixture = Mixture(blended=0.4, counting=share)
    chunk, plain = example_chunk((6, 0, 800, mixture)), example_chunk((6, 0, 800, Mixture()))
    usual = counted(plain).float().mean()
    told = counted(chunk)[blended(chunk.scenes)].float().mean()
    # The rest of the blends is of the plain stream, a little short of what cannot be blended.
    assert float(told) == pytest.approx(share + (1 - share) * float(usual), abs=0.1)


def test_patches_of_blends_have_classes_of_their_own(made):
    _, _, (after, _, _) = made
    kind = named(after)
    assert int(kind[..., 0].max()) == len(SHAPES) + len(PAIRS) - 1
    loss = PatchHead(16).loss(torch.randn(len(kind), 16, 16), kind, after.place)
    assert loss.isfinite()


def test_batches_with_and_without_blends_join(made):
    before, _, (after, _, _) = made
    both = SceneBatch.join([before[:3], after[:5]])
    assert len(both) == 8
    assert (both.other[:3] == -1).all()
    assert torch.equal(both.other[3:], after.other[:5])
    assert both.turn is None
    pictures = render(both, 32)
    assert torch.equal(pictures[:3], render(before[:3], 32))
