"""Tiny ternary pipelines, made by the product itself and shared by the room's tests, which must not write into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline

import tritflow


@pytest.fixture(scope="session")
def ternary_folder(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_flux` with a ternary transformer."""
    out = tmp_path_factory.mktemp("ternary") / "flux"
    tritflow.quantize(tiny_flux, out, "absmean", device="cpu")
    return out


@pytest.fixture
def pipe(ternary_folder: Path) -> Any:
    """A fresh ternary FluxPipeline, which a test may change."""
    pipe = FluxPipeline.from_pretrained(ternary_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def draw() -> Callable[..., torch.Tensor]:
    """One 32x32 picture [1, 3, 32, 32] in two steps, from noise of seed 0."""

    def drawn(pipe: Any, prompt: str = "a red star", **kwargs: Any) -> torch.Tensor:
        settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 32}
        generator = torch.Generator().manual_seed(0)
        pictures = pipe(prompt, generator=generator, output_type="pt", **settings | kwargs).images
        assert torch.isfinite(pictures).all()
        return pictures

    return drawn
