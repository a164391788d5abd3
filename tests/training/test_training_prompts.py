"""A student's prompts: what the teacher was told, invented words included, as text that gives the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tritflow.assets import asset_path
from tritflow.calibration.prompts import load_prompts
from tritflow.scenes import evaluation_prompts, training_captions
from tritflow.scenes.grammar import WORDS
from tritflow.training import data
from tritflow.training.models import RUNES
from tritflow.training.prompts import SEED, main, prompts

MIXTURE = data.Mixture(0.4, 0.4)


@pytest.fixture(scope="module")
def made() -> list[str]:
    return prompts(400, MIXTURE)


def test_text_and_tokens_say_the_same(made: list[str]) -> None:
    examples = data.make_examples(400, SEED, 1, MIXTURE)
    clip, t5 = data.tokenize(made, *data.word_tokenizers())
    assert clip.short().equal(examples.clip_ids)
    assert t5.short().equal(examples.t5_ids)


def test_so_do_the_shipped_tokenizers(made: list[str]) -> None:
    from transformers import AutoTokenizer

    shipped = [AutoTokenizer.from_pretrained(asset_path("small") / name) for name in ("tokenizer", "tokenizer_2")]
    texts = [*made, *training_captions(200), *(p.text for p in evaluation_prompts(5)), "A red Star, 7 of them!"]
    for ours, theirs in zip(data.word_tokenizers(), shipped, strict=True):
        assert ours(texts).input_ids == theirs(texts).input_ids
        assert len(ours) == len(theirs)


def test_many_are_told_in_invented_words_and_the_rest_in_plain_ones(made: list[str]) -> None:
    told = sum(any(c in RUNES for c in text) for text in made)
    assert 0.4 * 400 < told < 0.8 * 400
    words = set(WORDS)
    assert all(w.strip(",") in words for text in made if not set(text) & set(RUNES) for w in text.split())
    assert not any(c in RUNES for text in prompts(50, data.Mixture()) for c in text)
    assert prompts(50, MIXTURE, seed=1) != made[:50]


def test_no_prompt_is_one_that_is_judged(made: list[str]) -> None:
    judged = {p.text for p in evaluation_prompts(100)}
    assert not judged & set(made)


def test_the_command_writes_what_quantize_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path / "new" / "p.txt"), "--count", "60", "--workers", "1"])
    assert "60 prompts" in capsys.readouterr().out
    assert list(load_prompts(tmp_path / "new" / "p.txt").texts) == prompts(60, MIXTURE)


@pytest.mark.parametrize(
    ("options", "says"),
    [(["p.csv"], "ends in .txt"), (["p.txt", "--count", "0"], "at least 1"), (["p.txt", "--tinted", "2"], "a share")],
)
def test_refusals(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(options)
    assert says in capsys.readouterr().err
