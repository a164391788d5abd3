"""Every way that diffusers and accelerate have to keep weights elsewhere leaves pictures and bits as they are.

Devices are all the CPU here, which runs the same hooks; tests/gpu/test_offloading_gpu.py holds them to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from diffusers import FluxPipeline, FluxTransformer2DModel

from tritflow import TernaryLinear
from tritflow.modules import PackedWeight
from tritflow.testing import transformer_inputs

CPU = torch.device("cpu")

Offload = Callable[[Any, Path], None]


def sequential(pipe: Any, _: Path | None = None) -> None:
    """What `enable_sequential_cpu_offload` does, which names its device `cpu:0`: not the same to accelerate."""
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, CPU, offload_buffers=len(component._parameters) > 0)


OFFLOADS: dict[str, Offload] = {
    "model": lambda pipe, _: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": sequential,
    "blocks": lambda pipe, _: pipe.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1),
    "leaves": lambda pipe, _: pipe.enable_group_offload(CPU, offload_type="leaf_level"),
    "leaves on disk": lambda pipe, folder: pipe.transformer.enable_group_offload(
        CPU, offload_type="leaf_level", offload_to_disk_path=str(folder)
    ),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the order of float sums: a dense weight that has moved lies at another address, and without AVX-512
    PyTorch's products on a CPU sum by how it is aligned there."""
    return torch.allclose(a, b, rtol=0, atol=1e-5)


def ternary(model: Any) -> list[TernaryLinear]:
    return [m for m in model.modules() if isinstance(m, TernaryLinear)]


@pytest.mark.parametrize("name", OFFLOADS)
def test_pictures_are_the_same(pipe: Any, draw: Any, tmp_path: Path, name: str) -> None:
    plain = draw(pipe)
    OFFLOADS[name](pipe, tmp_path)
    for _ in range(2):  # the second call finds what the first one left
        assert same(draw(pipe), plain)


@pytest.mark.parametrize("name", [n for n in OFFLOADS if n != "leaves on disk"])
def test_a_lora_may_come_and_go_while_offloaded(
    pipe: Any, draw: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    # Loaders take hooks off and put them on again, for the accelerator that diffusers finds.
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.get_device", lambda: "cpu:0")
    monkeypatch.setattr(pipe, "enable_sequential_cpu_offload", lambda: sequential(pipe), raising=False)
    g = torch.Generator().manual_seed(1)
    lora = {}
    for at in ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"):
        linear = pipe.transformer.get_submodule(at)
        lora[f"transformer.{at}.lora_A.weight"] = torch.randn(4, linear.in_features, generator=g)
        lora[f"transformer.{at}.lora_B.weight"] = torch.randn(linear.out_features, 4, generator=g)
    plain = draw(pipe)
    pipe.load_lora_weights(lora)
    adapted = draw(pipe)
    assert not same(adapted, plain)
    pipe.unload_lora_weights()

    OFFLOADS[name](pipe, tmp_path)
    draw(pipe)
    pipe.load_lora_weights(lora)
    assert same(draw(pipe), adapted)
    pipe.unload_lora_weights()
    assert same(draw(pipe), plain)


def test_sequential_offload_leaves_no_weight_behind_and_gives_it_back(ternary_folder: Path) -> None:
    model: Any = FluxTransformer2DModel.from_pretrained(ternary_folder / "transformer")
    inputs = transformer_inputs(model)
    packed = [m.packed.clone() for m in ternary(model)]
    shapes = [tuple(m.weight.shape) for m in ternary(model)]
    with torch.no_grad():
        expected = model(**inputs)[0]
        cpu_offload(model, CPU)
        for _ in range(2):
            assert all(m.weight.is_meta for m in ternary(model))
            # LoRA loaders look at the shape while the weight is away.
            assert [tuple(m.weight.shape) for m in ternary(model)] == shapes
            assert same(model(**inputs)[0], expected)
        remove_hook_from_submodules(model)
        assert all(isinstance(m.weight, PackedWeight) and m.weight.device == CPU for m in ternary(model))
        assert [tuple(m.weight.shape) for m in ternary(model)] == shapes
        assert all(torch.equal(m.packed, was) for m, was in zip(ternary(model), packed, strict=True))
        assert same(model(**inputs)[0], expected)


def test_a_device_map_may_keep_parts_elsewhere(ternary_folder: Path, tmp_path: Path) -> None:
    model: Any = FluxTransformer2DModel.from_pretrained(ternary_folder / "transformer")
    inputs = transformer_inputs(model)
    parts: dict[str, Any] = {name: "cpu" for name, _ in model.named_children()}
    with torch.no_grad():
        expected = model(**inputs)[0]
        dispatch_model(model, parts | {"transformer_blocks": "disk"}, main_device="cpu", offload_dir=str(tmp_path))
        away = [m.weight.is_meta for m in ternary(model)]
        assert set(away) == {True, False}
        for _ in range(2):
            assert same(model(**inputs)[0], expected)


def test_a_pipeline_takes_a_device_map(ternary_folder: Path, draw: Any) -> None:
    plain = FluxPipeline.from_pretrained(ternary_folder)
    mapped = FluxPipeline.from_pretrained(ternary_folder, device_map="cpu")
    assert same(draw(mapped), draw(plain))
