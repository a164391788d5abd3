"""Offloading with a real accelerator: the same pictures, and weights that are truly elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

import tritflow
from tritflow import TernaryLinear
from tritflow.testing import tiny_flux_folder, transformer_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

CUDA = torch.device("cuda:0")
OFFLOADS: dict[str, Callable[[Any], None]] = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(),
    "sequential": lambda pipe: pipe.enable_sequential_cpu_offload(),
    "blocks": lambda pipe: pipe.enable_group_offload(CUDA, offload_type="block_level", num_blocks_per_group=1),
    "leaves": lambda pipe: pipe.enable_group_offload(CUDA, offload_type="leaf_level"),
    "leaves, streamed": lambda pipe: pipe.enable_group_offload(CUDA, offload_type="leaf_level", use_stream=True),
    "blocks, streamed": lambda pipe: pipe.enable_group_offload(
        CUDA, offload_type="block_level", num_blocks_per_group=1, use_stream=True, low_cpu_mem_usage=True
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ternary pipeline whose blocks hold 16 MB packed, far more than everything else in it."""
    root = tmp_path_factory.mktemp("offload")
    flux = tiny_flux_folder(root / "flux", hidden=512, heads=8, double=2, single=8, dtype=torch.bfloat16)
    tritflow.quantize(flux, root / "ternary", "absmean", device="cpu")
    return root / "ternary"


def load(folder: Path, **kwargs: Any) -> Any:
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 32}
    generator = torch.Generator().manual_seed(0)
    return pipe("a red star", generator=generator, output_type="pt", **settings).images.cpu()


def lora(transformer: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    tensors = {}
    for at in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"):
        linear = transformer.get_submodule(at)
        tensors[f"transformer.{at}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=g)
        tensors[f"transformer.{at}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=g)
    return tensors


@pytest.mark.parametrize("name", OFFLOADS)
def test_pictures_are_the_same_and_a_lora_may_come_and_go(folder: Path, name: str) -> None:
    pytest.importorskip("peft")
    resident = load(folder).to(CUDA)
    plain = draw(resident)
    tensors = lora(resident.transformer)
    resident.load_lora_weights(tensors)
    adapted = draw(resident)
    assert not torch.equal(adapted, plain)
    del resident

    pipe = load(folder)
    OFFLOADS[name](pipe)
    for _ in range(2):
        assert torch.equal(draw(pipe), plain)
    pipe.load_lora_weights(tensors)
    assert torch.equal(draw(pipe), adapted)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)


# accelerate's sequential offload knows no streams.
@pytest.mark.parametrize(
    ("name", "streamed"),
    [("block_level", False), ("block_level", True), ("leaf_level", False), ("leaf_level", True), ("sequential", False)],
)
def test_weights_are_elsewhere(folder: Path, name: str, streamed: bool) -> None:
    model: Any = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    packed = sum(m.weight.nbytes for m in model.modules() if isinstance(m, TernaryLinear))
    inputs = transformer_inputs(model, dtype=torch.bfloat16)
    inputs = {k: v.to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad():
        model.to(CUDA)
        expected = model(**inputs)[0]
        model.to("cpu")
        torch.cuda.empty_cache()
        if name == "sequential":
            from accelerate import cpu_offload

            cpu_offload(model, CUDA)
        else:
            blocks = 1 if name == "block_level" else None
            model.enable_group_offload(CUDA, offload_type=name, num_blocks_per_group=blocks, use_stream=streamed)
        for _ in range(3):  # streams learn the order in the first call
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            assert torch.equal(model(**inputs)[0], expected)
            assert torch.cuda.max_memory_allocated() - before < packed / 2


def test_device_maps(folder: Path) -> None:
    plain = draw(load(folder).to(CUDA))
    assert torch.equal(draw(load(folder, device_map="cuda")), plain)
    assert torch.equal(draw(load(folder, device_map="balanced")), plain)
    parts = {"": 0, "single_transformer_blocks": "cpu"}
    model: Any = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.bfloat16)
    inputs = transformer_inputs(model, dtype=torch.bfloat16)
    inputs = {k: v.to(CUDA) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    split: Any = FluxTransformer2DModel.from_pretrained(
        folder / "transformer", torch_dtype=torch.bfloat16, device_map=parts
    )
    with torch.no_grad():
        assert torch.equal(split(**inputs)[0], model.to(CUDA)(**inputs)[0])
