"""Pictures depend on prompt and seed alone, and what cannot be drawn is said in one line."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tritflow.pipelines.generate import (
    GenerationError,
    PromptWarning,
    generate,
    picture_noise,
    picture_path,
    save_pictures,
)
from tritflow.pipelines.loading import load_pipeline


@pytest.fixture(scope="module")
def pipe(tiny_flux: Path) -> Any:
    return load_pipeline(tiny_flux, device="cpu")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.int64)


def test_agrees_with_the_stock_call(pipe: Any) -> None:
    ours = generate(pipe, "a red circle", 5)[0]
    stock = pipe(
        "a red circle",
        generator=torch.Generator("cpu").manual_seed(5),
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=32,
        guidance_scale=3.5,
    ).images[0]
    assert np.array_equal(pixels(ours), pixels(stock))


def test_noise_is_packed_as_the_pipeline_packs_it(pipe: Any) -> None:
    plain = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(3))
    assert torch.equal(picture_noise(3, 4, 6, 8), pipe._pack_latents(plain, 1, 4, 6, 8))


def test_batch_size_does_not_change_pictures(pipe: Any) -> None:
    prompts, seeds = ["a red circle", "two stars", "a blue ring"], [1, 2, 3]
    apart = generate(pipe, prompts, seeds, batch_size=1)
    together = generate(pipe, prompts, seeds, batch_size=3)
    for a, b in zip(apart, together, strict=True):
        assert np.abs(pixels(a) - pixels(b)).max() <= 1  # sums in another order may tip a rounding


def test_seed_prompt_and_settings_matter(pipe: Any) -> None:
    first, again, seed, text = generate(pipe, ["a star", "a star", "a star", "a ring"], [0, 0, 1, 0])
    assert np.array_equal(pixels(first), pixels(again))
    assert not np.array_equal(pixels(first), pixels(seed))
    assert not np.array_equal(pixels(first), pixels(text))
    wide = generate(pipe, "a star", width=48, num_inference_steps=1)[0]
    assert wide.size == (48, 32)
    assert not np.array_equal(pixels(first), pixels(generate(pipe, "a star", guidance_scale=1.0)[0]))


def test_reports_every_step_of_every_batch(pipe: Any) -> None:
    seen: list[tuple[int, int]] = []
    generate(pipe, ["a", "b", "c"], batch_size=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_long_prompt_is_cut_with_one_line(pipe: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images = generate(pipe, "a red circle " * 3334)
    lines = [str(w.message) for w in caught if issubclass(w.category, PromptWarning)]
    assert len(lines) == 1
    assert "10003 text tokens; only the first 32 are read" in lines[0]
    assert len(lines[0]) < 200
    assert len(images) == 1
    assert "truncated" not in capfd.readouterr().err


def test_empty_prompt_is_drawn_with_a_note(pipe: Any) -> None:
    with pytest.warns(PromptWarning, match="empty"):
        assert len(generate(pipe, "")) == 1


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"height": 100}, "height 100 is not a multiple of 16; the nearest valid: 96 and 112"),
        ({"width": 7}, "width 7 is not a multiple of 16; the nearest valid: 16"),
        ({"width": 0}, "the nearest valid: 16"),
        ({"height": -16}, "height -16"),
        ({"num_inference_steps": 0}, "steps must be at least 1"),
        ({"guidance_scale": float("nan")}, "guidance"),
        ({"max_sequence_length": 513}, "1 to 512"),
        ({"seeds": [1, 2]}, "1 prompts need as many seeds or one, not 2"),
        ({"seeds": -1}, "seed -1 is out of range"),
        ({"batch_size": 0}, "batch size"),
        ({"prompts": []}, "no prompt"),
    ],
)
def test_what_cannot_be_drawn_is_refused(pipe: Any, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(GenerationError, match=said) as refused:
        generate(pipe, **{"prompts": "a star", **asked})
    assert "\n" not in str(refused.value)


def test_nan_is_no_picture(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.no_grad():
        bias = pipe.transformer.proj_out.bias
        monkeypatch.setattr(bias, "data", torch.full_like(bias, float("nan")))
    with pytest.raises(GenerationError, match="NaN"):
        generate(pipe, "a star")


def test_pictures_are_saved_with_their_prompt(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4), (1, 2, 3))
    (one,) = save_pictures([image], tmp_path / "new" / "a.png", [{"prompt": "ein Würfel", "seed": "1"}])
    with Image.open(one) as read:
        assert read.info["prompt"] == "ein Würfel"
        assert np.array_equal(pixels(read), pixels(image))
    several = save_pictures([image, image], tmp_path / "b")
    assert [p.name for p in several] == ["b-0.png", "b-1.png"]
    with pytest.raises(GenerationError, match="PNG"):
        save_pictures([image], tmp_path / "a.jpg")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(GenerationError, match="folder"):
        save_pictures([image], tmp_path / "folder.png")


def test_a_place_for_pictures_is_checked_before_drawing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder.png").mkdir()
    for out, words in (
        (tmp_path / "file" / "p.png", "no folder can be made there"),
        (tmp_path / "p.jpg", "ending in .png"),
        (tmp_path / "folder", "is a folder"),
    ):
        with pytest.raises(GenerationError, match=words):
            picture_path(out)
    assert picture_path(tmp_path / "new" / "p") == tmp_path / "new" / "p.png"
    assert (tmp_path / "new").is_dir()
