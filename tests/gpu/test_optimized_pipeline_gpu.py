"""Optimized pipelines on a GPU: loaded straight to it, and the same picture from the same seed, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import tritflow
from tritflow.models.flux1 import is_modulation
from tritflow.modules import TernaryLinear
from tritflow.pipelines.generate import generate
from tritflow.pipelines.loading import load_pipeline
from tritflow.pipelines.optimize import is_optimized, optimize
from tritflow.testing import tiny_flux_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", params=["2bit", "base3"])
def folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A ternary pipeline with blocks wide enough for every kernel."""
    root = tmp_path_factory.mktemp("optimized")
    flux = tiny_flux_folder(root / "flux", hidden=512, heads=4, double=2, single=4, dtype=torch.bfloat16)
    tritflow.quantize(flux, root / "ternary", "absmean", device="cpu", packing=request.param)
    return root / "ternary"


def draw(pipe: Any) -> list[bytes]:
    pictures = generate(
        pipe, ["a red star", "two blue rings"], [3, 4], height=64, width=64, num_inference_steps=4, batch_size=2
    )
    return [picture.tobytes() for picture in pictures]


@pytest.mark.parametrize("mode", ["w2a8", "w2a16"])
def test_a_seed_draws_the_same_picture_bit_for_bit(folder: Path, mode: str) -> None:
    """By one pipeline again and again (graphs replayed), and by one that was loaded and optimized another way."""
    pipe = load_pipeline(folder, device="cuda", mode=mode, optimized=True)
    assert is_optimized(pipe)
    first = draw(pipe)
    assert first[0] != first[1]
    for _ in range(3):
        assert draw(pipe) == first
    assert draw(optimize(load_pipeline(folder, device="cuda", mode=mode))) == first
    assert draw(optimize(load_pipeline(folder, device="cpu", dtype="bfloat16", mode=mode), device="cuda")) == first


def test_modulation_never_enters_the_gpu(folder: Path) -> None:
    pipe = load_pipeline(folder, device="cuda", optimized=True)
    layers = {name: m for name, m in pipe.transformer.named_modules() if isinstance(m, TernaryLinear)}
    assert any(map(is_modulation, layers))
    for name, layer in layers.items():
        where = {tensor.device.type for tensor in (*layer.parameters(), *layer.buffers())}
        assert where == ({"cpu"} if is_modulation(name) else {"cuda"}), name
        assert not is_modulation(name) or layer.packed.is_pinned(), name
    stock = load_pipeline(folder, device="cuda")
    for name, layer in layers.items():
        assert torch.equal(layer.packed.cpu(), stock.transformer.get_submodule(name).packed.cpu()), name
