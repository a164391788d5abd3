"""What a round trip loses is found, colour by colour, texture by texture, ground by ground."""

from __future__ import annotations

import torch
from torch import Tensor

from tritflow.scenes import COLORS, TEXTURES, weakest


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
