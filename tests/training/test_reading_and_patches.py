"""The helpers of the first minutes: nouns find their objects, patches their owners, and heads learn both."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tritflow.scenes import COLORS, SHAPES, TEXTURES, Object, Scene, SceneBatch
from tritflow.scenes.grammar import PLURAL
from tritflow.scenes.held_out import evaluation_prompts
from tritflow.training import models
from tritflow.training.data import Examples, LatentSet, make_examples, tokenize, word_tokenizers
from tritflow.training.flow import SmallFlux, image_ids
from tritflow.training.models import RUNES
from tritflow.training.patches import PatchHead, patch_owners
from tritflow.training.reading import (
    InventedWords,
    Reader,
    learn_to_read,
    moved,
    named_objects,
    reads,
    reads_unseen,
    told_before,
    word_table,
)
from tritflow.training.supply import Supply

TINY = models.SmallFluxSize(hidden=64, heads=2, double=1, single=2, text_width=32, text_layers=1, pooled_width=32)


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    return word_tokenizers()


def latent_set(examples: Examples) -> LatentSet:
    """Examples with random latents: no VAE is needed here."""
    empty_clip, empty_t5 = tokenize([""], *word_tokenizers())
    latents = torch.randn(len(examples), 4, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    scenes = examples.scenes
    ids = examples.clip_ids.long(), examples.t5_ids.long()
    return LatentSet(latents, *ids, scenes.kind.to(torch.int8), scenes.place, scenes.ground, empty_clip, empty_t5)


def test_nouns_find_their_objects(tokenizers: tuple[Any, Any]) -> None:
    table = word_table(tokenizers[1], [(shape, PLURAL[shape]) for shape in SHAPES])
    for text, shapes in (("two red stars above a ring", ["star", "ring"]), ("crosses, a heart", ["cross", "heart"])):
        nouns = table[tokenizers[1](text, return_tensors="pt").input_ids]
        assert [SHAPES[i] for i in nouns[nouns >= 0]] == shapes
    star, ring = SHAPES.index("star"), SHAPES.index("ring")
    kind = torch.tensor([[[ring, 0, 0], [star, 1, 0], [star, 2, 0], [-1, -1, -1]]])
    # Told in another order than they were painted: the shape decides; told twice: the order does.
    slots, many = named_objects(torch.tensor([[-1, star, -1, ring, star]]), kind)
    assert slots[0, [1, 3, 4]].tolist() == [1, 0, 2]
    assert many[0, [1, 3, 4]].tolist() == [2, 1, 2]


def test_patches_belong_to_the_object_in_front() -> None:
    behind = Object("square", "red", "solid", 0.5, 0.5, 0.3)
    front = Object("circle", "blue", "striped", 0.25, 0.25, 0.2)
    batch = SceneBatch.from_scenes([Scene((behind, front))])
    slots, offset = patch_owners(batch.kind, batch.place, 8)
    grid = slots.view(8, 8)
    assert grid[1, 1] == 1
    assert grid[4, 4] == 0  # (.5625, .5625) lies in the square alone
    assert grid[3, 3] == 1  # (.4375, .4375) lies in both: the circle is in front
    assert grid[7, 7] == -1
    centre = (torch.tensor([1, 1]) + 0.5) / 8
    expected = [(0.25 - float(centre[0])) / 0.2, (0.25 - float(centre[1])) / 0.2, 0.8]
    assert offset.view(8, 8, 3)[1, 1].tolist() == pytest.approx(expected, abs=1e-5)
    assert offset.view(8, 8, 3)[7, 7].tolist() == [0, 0, 0]


def test_a_head_learns_the_owners_from_tokens_that_hold_them() -> None:
    scenes = make_examples(64, seed=3, workers=1).scenes
    slots, offset = patch_owners(scenes.kind, scenes.place, 4)
    facts = scenes.kind.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, 3))
    one_hot = [torch.nn.functional.one_hot(facts[..., i].clamp(min=0), 8).float() for i in range(3)]
    tokens = torch.cat([*one_hot, offset, (slots >= 0)[..., None].float(), torch.zeros(64, 16, 4)], dim=-1)
    torch.manual_seed(0)
    head = PatchHead(tokens.shape[-1], 64)
    optimizer = torch.optim.Adam(head.parameters(), 5e-3)
    first = head.loss(tokens, scenes.kind, scenes.place).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(tokens, scenes.kind, scenes.place)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.15 * first


def test_reading_lowers_its_error(tokenizers: tuple[Any, Any]) -> None:
    data = latent_set(make_examples(256, seed=5, workers=1))
    torch.manual_seed(0)
    clip, t5 = models.build_text_encoders(TINY, *tokenizers)
    reader = Reader(TINY.text_width, TINY.pooled_width, tokenizers)

    def error() -> float:
        index = torch.arange(256)
        with torch.no_grad():
            pooled = clip(data.clip_ids).pooler_output
            states = t5(data.t5_ids).last_hidden_state
            unchanged = torch.full((256, len(SHAPES) + len(COLORS) + len(TEXTURES)), -1)
            return float(reader.loss(states, pooled, data.t5_ids, unchanged, data, index))

    first = error()
    ticks = itertools.count()  # a clock of steps: as many on a slow machine
    learn_to_read(clip, t5, reader, data, seconds=10, batch=32, graph=False, clock=lambda: float(next(ticks)))
    assert error() < 0.9 * first


def test_kept_encoders_are_refreshed_gently(tokenizers: tuple[Any, Any]) -> None:
    data = latent_set(make_examples(64, seed=5, workers=1))
    torch.manual_seed(0)
    kept = models.build_text_encoders(TINY, *tokenizers)
    steps = {}
    for rate in (1.0, 0.1):
        clip, t5 = (copy.deepcopy(m) for m in kept)
        reader = Reader(TINY.text_width, TINY.pooled_width, tokenizers)
        ticks = itertools.count()
        learn_to_read(
            clip,
            t5,
            reader,
            data,
            seconds=2,
            batch=8,
            encoder_rate=rate,
            graph=False,
            clock=lambda c=ticks: float(next(c)),
        )
        pairs = [
            p for m, n in zip((clip, t5), kept, strict=True) for p in zip(m.parameters(), n.parameters(), strict=True)
        ]
        steps[rate] = float(torch.cat([(a - b).detach().abs().flatten() for a, b in pairs]).mean())
    assert 0 < steps[0.1] < 0.15 * steps[1.0]


def test_reading_rightly_is_told_from_a_bag_of_words(tokenizers: tuple[Any, Any]) -> None:
    data = latent_set(make_examples(1024, seed=8, workers=1))
    reader = Reader(32, 64, tokenizers)
    ids = data.t5_ids
    nouns, told, _ = reader.told(ids)
    first = (nouns >= 0) & ((nouns >= 0).cumsum(1) == 1)
    color = len(SHAPES) + 24  # where the logits of colours begin

    class States:
        """Hands over states that make heads say what `colors` says, and the first noun left of the second or not."""

        def __init__(self, colors: torch.Tensor, sign: float) -> None:
            self.last_hidden_state = torch.zeros(*ids.shape, 32)
            self.last_hidden_state[..., :8] = torch.nn.functional.one_hot(colors.clamp(min=0), 8).float()
            self.last_hidden_state[..., 8] = torch.where(first, -sign, sign)

    with torch.no_grad():
        reader.at_noun.weight.zero_()
        reader.at_noun.bias.zero_()
        reader.at_noun.weight[color : color + 8, :8] = torch.eye(8)
        reader.at_noun.weight[-3, 8] = 1
    right = reads(lambda _: States(told, 1.0), reader, data, tokenizers[1])
    assert right == {"colors": 1.0, "sides": 1.0}
    wrong = reads(lambda _: States((told + 1) % 8, -1.0), reader, data, tokenizers[1])
    assert wrong == {"colors": 0.0, "sides": 0.0}


def test_what_is_said_of_a_noun_stands_between_it_and_the_one_before() -> None:
    nouns = torch.tensor([[-1, -1, 4, -1, -1, 5, -1, 6]])
    words = torch.tensor([[-1, 2, -1, 3, 1, -1, -1, -1]])
    assert told_before(nouns, words).tolist() == [[-1, -1, 2, -1, -1, 1, -1, -1]]


def test_invented_words_take_the_places_of_nouns_and_colors(tokenizers: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    clip_ids, t5_ids = tokenize(["two red stars, a striped star and a blue ring", "a ring"], *tokenizers)
    words = InventedWords(*tokenizers)
    choice = torch.full((2, len(SHAPES) + len(COLORS) + len(TEXTURES)), -1)
    choice[0, SHAPES.index("star")] = 1
    choice[0, len(SHAPES) + COLORS.index("red")] = 24
    changed = words.replace(t5_ids, "t5", choice)
    said = [t for t in tokenizers[1].convert_ids_to_tokens(changed[0]) if not t.startswith("<")]
    star, red = RUNES[1], RUNES[24]
    assert said == ["▁two", red, star, ",", "▁a", "▁striped", star, "▁and", "▁a", "▁blue", "▁ring"]
    assert torch.equal(changed[1], t5_ids[1])
    clip_said = tokenizers[0].convert_ids_to_tokens(words.replace(clip_ids, "clip", choice)[0])
    assert clip_said.count(star) == 2
    assert clip_said.count(red) == 1
    assert words.text(words.replace(clip_ids, "clip", choice)[0].tolist(), tokenizers[0]) == (
        f"two{red}{star}, a striped{star} and a blue ring"
    )
    many = words.choose(4000, captions=0.9)
    assert set(many[:, :8].unique().tolist()) == set(range(-1, 24))
    assert set(many[:, 8:16].unique().tolist()) == {-1, *range(24, 36)}
    assert set(many[:, 16:].unique().tolist()) == {-1, *range(36, 44)}
    assert all(len(set(row)) == len(row) for row in ([n for n in r if n >= 0] for r in many.tolist()))
    assert 0.57 < float((many >= 0).float().mean()) < 0.63
    assert float((words.choose(100, captions=0.0) >= 0).float().sum()) == 0
    assert float((words.choose(100, 1.0, 1.0) < 0).float().sum()) == 0


def test_labels_follow_the_invented_words() -> None:
    choice = torch.full((2, len(SHAPES) + len(COLORS) + len(TEXTURES)), -1)
    choice[0, 1] = 3  # the second shape becomes the fourth invented noun
    choice[1, len(SHAPES)] = 24  # the first colour becomes the first invented colour
    index = torch.tensor([[0, 1, -1], [0, 1, -1]])
    assert InventedWords.renamed(index, choice, 0).tolist() == [[0, 8 + 3, -1], [0, 1, -1]]
    assert InventedWords.renamed(index, choice, 1).tolist() == [[0, 1, -1], [8, 1, -1]]
    assert InventedWords.renamed(index, choice, 2).tolist() == [[0, 1, -1], [0, 1, -1]]


def test_states_that_stay_have_not_moved_and_unrelated_ones_have_by_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    pooled, other = (torch.randn(4000, 8, generator=generator) * 3 for _ in range(2))
    assert float(moved(pooled, pooled)) == 0
    assert float(moved(pooled, other)) == pytest.approx(1, rel=0.05)


def test_unseen_prompts_are_read_by_all_that_was_said(tokenizers: tuple[Any, Any]) -> None:
    reader = Reader(32, 64, tokenizers)
    prompts = evaluation_prompts(2, 5)

    class Silent:
        last_hidden_state = torch.zeros(len(prompts), 48, 32)

    with torch.no_grad():
        reader.at_noun.weight.zero_()
        reader.at_noun.bias.zero_()
        reader.at_noun.bias[SHAPES.index("ring")] = 1
        reader.at_noun.bias[8 + 24 + 8 + 12] = 1  # no colour
        reader.at_noun.bias[8 + 24 + 8 + 12 + 1 + 3 + 8] = 1  # no texture
    _, ids = tokenize([p.text for p in prompts], *tokenizers)
    nouns, colors, textures = reader.told(ids)
    plain = (nouns == SHAPES.index("ring")) & (colors < 0) & (textures < 0)
    expected = float(plain[nouns >= 0].float().mean())
    assert reads_unseen(lambda _: Silent(), reader, prompts, tokenizers) == pytest.approx(expected)


def test_the_tapped_forward_is_the_stock_forward(tokenizers: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    clip, t5 = models.build_text_encoders(TINY, *tokenizers)
    model = SmallFlux(clip, t5, models.build_transformer(TINY))
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, sigma, guidance = torch.randn(2, 16, 64), torch.rand(2), torch.full((2,), 3.0)
    text = (torch.randn(2, 7, TINY.text_width), torch.randn(2, TINY.pooled_width))
    with torch.no_grad():
        stock = model.velocity(x, sigma, text, guidance, 4)
        tapped, middle = model.velocity_and_tokens(x, sigma, text, guidance, 4)
    assert float(stock.std()) > 0
    assert torch.equal(stock, tapped)
    assert middle.shape == (2, 16, 64)
    assert image_ids(4, torch.device("cpu")).shape == (16, 3)


def test_fresh_examples_overwrite_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritflow.training.supply.CHUNK", 8)
    data = latent_set(make_examples(20, seed=6, workers=1))
    before = data.t5_ids.clone()
    monkeypatch.setattr("tritflow.training.supply.encode_set", lambda examples, *_: latent_set(examples))

    class Now(ThreadPoolExecutor):
        def submit(self, work: Any, task: Any) -> Future[Any]:  # type: ignore[override]
            future: Future[Any] = Future()
            future.set_result(work(task))
            return future

    pool: Executor = Now(1)
    supply = Supply(pool, seed=6, made=20, ahead=2)
    assert supply.next == 3 + 2  # chunks 0..2 hold the first 20
    pointer = data.t5_ids.data_ptr()
    assert supply.refill(data, None, 32, most=2) == 16
    changed = (data.t5_ids != before).any(1)
    assert changed[:16].float().mean() > 0.9
    assert not changed[16:].any()
    supply.refill(data, None, 32)
    assert supply.place == 4  # around the end
    assert data.t5_ids.data_ptr() == pointer
    supply.close()
