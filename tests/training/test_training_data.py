"""Pictures, latents and tokens: as FluxPipeline packs and cuts them, and the same for every number of workers."""

from __future__ import annotations

import pytest
import torch

from tritflow.scenes import evaluation_prompts, training_captions
from tritflow.scenes.grammar import WORDS
from tritflow.training.data import make_examples, pack, render_all, tokenize, unpack
from tritflow.training.models import SEQUENCE_LENGTH, build_tokenizers


@pytest.fixture(scope="module")
def tokenizers():  # type: ignore[no-untyped-def]
    return build_tokenizers(list(WORDS))


@pytest.mark.parametrize("size", [(4, 4), (8, 12)])
def test_packing_is_the_pipelines(size: tuple[int, int]) -> None:
    from diffusers import FluxPipeline

    h, w = size
    latents = torch.randn(2, 16, h, w, generator=torch.Generator().manual_seed(0))
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, h, w))
    assert torch.equal(unpack(packed, h, w), latents)
    assert torch.equal(unpack(packed, h, w), FluxPipeline._unpack_latents(packed, h * 8, w * 8, 8))


def test_a_word_is_a_token(tokenizers) -> None:  # type: ignore[no-untyped-def]
    clip, t5 = tokenizers
    texts = training_captions(200, seed=3) + [p.text for p in evaluation_prompts(5)]
    for text in texts:
        count = len(text.split()) + text.count(",")
        assert len(clip(text).input_ids) == count + 2, text
        assert len(t5(text).input_ids) == count + 1, text
        assert clip.decode(clip(text).input_ids, skip_special_tokens=True).replace(" ,", ",").strip() == text
    assert clip.unk_token_id not in clip("a red star").input_ids[1:-1]


def test_no_training_caption_is_cut(tokenizers) -> None:  # type: ignore[no-untyped-def]
    clip, t5 = tokenizers
    captions = training_captions(4000, seed=5)
    longest = sorted(captions, key=lambda c: len(c.split()) + c.count(","))[-20:]
    assert max(len(clip(c).input_ids) for c in longest) <= SEQUENCE_LENGTH
    assert max(len(t5(c).input_ids) for c in longest) <= SEQUENCE_LENGTH


def test_unknown_words_are_spelled(tokenizers) -> None:  # type: ignore[no-untyped-def]
    clip, t5 = tokenizers
    assert len(clip("zebra").input_ids) > 3
    assert len(t5("zebra").input_ids) > 2
    assert t5.unk_token_id not in t5("zebra").input_ids


def test_tokens_are_padded_to_the_models_length(tokenizers) -> None:  # type: ignore[no-untyped-def]
    clip_ids, t5_ids = tokenize(["a red star", "", "a " * 80], *tokenizers)
    assert clip_ids.shape == t5_ids.shape == (3, SEQUENCE_LENGTH)
    assert int((t5_ids[1] != tokenizers[1].pad_token_id).sum()) == 1


def test_tokenizers_survive_their_folder(tokenizers, tmp_path) -> None:  # type: ignore[no-untyped-def]
    from transformers import AutoTokenizer

    for i, tokenizer in enumerate(tokenizers):
        tokenizer.save_pretrained(tmp_path / str(i))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(i))
        text = "a checkered red star, a ring and a blue heart"
        assert loaded(text).input_ids == tokenizer(text).input_ids


def test_examples_do_not_depend_on_the_number_of_workers() -> None:
    one = make_examples(4100, seed=1, workers=1)
    two = make_examples(4100, seed=1, workers=2)
    assert len(one) == len(one.t5_ids) == 4100
    assert torch.equal(one.t5_ids, two.t5_ids)
    assert torch.equal(one.clip_ids, two.clip_ids)
    assert torch.equal(one.scenes.kind, two.scenes.kind)
    assert torch.equal(one.scenes.place, two.scenes.place)
    # Every chunk has a seed of its own.
    assert not torch.equal(one.t5_ids[:4], one.t5_ids[4096:])


def test_pictures_are_bytes() -> None:
    scenes = make_examples(5, seed=2, workers=1).scenes
    pictures = render_all(scenes, 32, torch.device("cpu"), batch=2)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == (5, 3, 32, 32)
    assert torch.equal(pictures[3:4], render_all(scenes[slice(3, 4)], 32, torch.device("cpu")))
