"""The flow's captions: some dropped, some told in invented words, and those the model hears."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tritflow.training import flow, models
from tritflow.training.data import LatentSet, make_examples, tokenize, word_tokenizers
from tritflow.training.patches import PatchHead
from tritflow.training.words import InventedWords

TINY = models.SmallFluxSize(hidden=64, heads=2, double=1, single=2, text_width=32, text_layers=1, pooled_width=32)


@pytest.fixture(scope="module")
def tokenizers() -> tuple[Any, Any]:
    return word_tokenizers()


@pytest.mark.parametrize("invent", [False, True])
def test_some_captions_reach_the_model_in_invented_words(tokenizers: tuple[Any, Any], invent: bool) -> None:
    torch.manual_seed(0)
    examples = make_examples(64, seed=3, workers=1)
    empty_clip, empty_t5 = tokenize([""], *tokenizers)
    scenes = examples.scenes
    ids = examples.clip_ids.long(), examples.t5_ids.long()
    latents = torch.randn(64, 16, 64).bfloat16()
    data = LatentSet(latents, *ids, scenes.kind.to(torch.int8), scenes.place, scenes.ground, empty_clip, empty_t5)
    clip, t5 = models.build_text_encoders(TINY, *tokenizers)
    model = flow.SmallFlux(clip, t5, models.build_transformer(TINY))
    words = InventedWords(*tokenizers)
    heard: list[tuple[torch.Tensor, torch.Tensor]] = []
    plain = model.text

    def text(clip_ids: torch.Tensor, t5_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        heard.append((clip_ids, t5_ids))
        return plain(clip_ids, t5_ids)

    model.text = text  # type: ignore[method-assign]
    loss = flow.flow_loss(model, data, 256, 4, PatchHead(64), torch.zeros(()), words if invent else None)()
    assert loss.isfinite()
    ((clip_ids, t5_ids),) = heard
    dropped = (t5_ids == empty_t5).all(1)
    assert 0.03 < float(dropped.float().mean()) < 0.2
    assert torch.equal(dropped, (clip_ids == empty_clip).all(1))
    t5_told = torch.isin(t5_ids, words.t5_invented).any(1)  # type: ignore[arg-type]
    clip_told = torch.isin(clip_ids, words.clip_invented).any(1)  # type: ignore[arg-type]
    assert torch.equal(t5_told, clip_told)
    if invent:
        assert 0.1 < float(t5_told.float().mean()) < 0.35
    else:
        assert not t5_told.any()
