"""What a round trip loses is found, colour by colour, texture by texture, ground by ground; and marks on the ground."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from tritflow.scenes import COLORS, TEXTURES, evaluation_prompts, marked, render, scene_of, texture_contrast, weakest
from tritflow.scenes.render import SceneBatch
from tritflow.scenes.world import DARK


def greenless(pixels: Tensor) -> Tensor:
    """Loses nothing but what is green on black."""
    green = (pixels[:, 1:2] > pixels[:, :1] + 0.1) & (pixels[:, 1:2] > pixels[:, 2:] + 0.1)
    dark = pixels[:, :, :1, :1].amax(1, keepdim=True) < 0.2  # a corner: the ground
    return torch.where(green & dark, 0.0, pixels)


def test_the_weakest_combination_is_found() -> None:
    found = weakest(greenless, 32, pictures=3)
    assert len(found) == len(COLORS) * len(TEXTURES) * 3
    assert found == sorted(found)
    lost = {name for db, name in found if db < 30}
    assert lost == {f"green {texture} black" for texture in TEXTURES}


def test_nothing_lost_is_a_hundred_decibels() -> None:
    assert {db for db, _ in weakest(lambda pixels: pixels, 32, pictures=1)} == {100.0}


@pytest.mark.parametrize("size", [128, 192])
def test_true_pictures_have_no_marks_to_speak_of(size: int) -> None:
    scenes = SceneBatch.from_scenes([scene_of(p) for p in evaluation_prompts(3)])
    pixels = (render(scenes, size) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    # A dim tip of a small star may lie further from what counts as an object.
    assert max(marked(picture) for picture in pixels) < 0.0005


def test_a_ghost_is_a_mark_and_what_nobody_sees_is_none() -> None:
    picture = np.full((128, 128, 3), 140, dtype=np.uint8)
    picture[20:50, 20:50] = (230, 20, 30)  # an object
    picture[80:90, 80:90] += 12
    assert marked(picture) == pytest.approx(100 / (128**2 - 40**2), rel=0.02)
    picture[80:90, 80:90] -= 8
    assert marked(picture) == 0


def test_a_picture_without_ground_has_no_marks() -> None:
    assert marked(np.full((32, 32, 3), (250, 10, 10), dtype=np.uint8)) == 0


@pytest.mark.parametrize("size", [128, 256])
def test_a_textures_contrast_is_what_the_renderer_draws_and_falls_with_blur(size: int) -> None:
    prompts = evaluation_prompts(12, tags=["texture"])
    pixels = (render(SceneBatch.from_scenes([scene_of(p) for p in prompts]), size) * 255).round().byte()
    found = [texture_contrast(p) for p in pixels.permute(0, 2, 3, 1).numpy()]
    drawn = (1 - DARK) / (1 + DARK)
    assert np.median(found) == pytest.approx(drawn, abs=0.01)  # type: ignore[arg-type]
    assert min(found) > 0.8 * drawn  # type: ignore[type-var]
    blurred = gaussian_filter(pixels.float().numpy(), (0, 0, size / 40, size / 40)).round().astype(np.uint8)
    washed = [texture_contrast(p) for p in blurred.transpose(0, 2, 3, 1)]
    assert np.median(washed) < 0.5 * drawn  # type: ignore[arg-type]


def test_contrast_of_even_objects_and_of_none() -> None:
    picture = np.full((128, 128, 3), 140, dtype=np.uint8)
    assert texture_contrast(picture) is None
    picture[20:70, 20:70] = (230, 20, 30)
    assert texture_contrast(picture) == 0.0
