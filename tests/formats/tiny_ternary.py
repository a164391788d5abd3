"""A small ternary FLUX transformer in memory, with odd sizes so that padding is met everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tritflow.config import TernaryConfig
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.checkpoint import TransformerWriter

CONFIG: dict[str, Any] = {
    **FLUX1_DEV,
    "_diffusers_version": "0.42.1",
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 4, 4],
    "in_channels": 8,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 10,
    "num_layers": 1,
    "num_single_layers": 2,
    "guidance_embeds": True,
}


def tiny_tensors(ternary: TernaryConfig, seed: int = 0) -> tuple[dict[str, dict[str, Any]], dict[str, torch.Tensor]]:
    """Random linears (arguments of `add_linear`) and dense tensors of the architecture `CONFIG`."""
    generator = torch.Generator().manual_seed(seed)
    linears: dict[str, dict[str, Any]] = {}
    dense: dict[str, torch.Tensor] = {}
    for name, shape in flux1_shapes(CONFIG).items():
        module, _, part = name.rpartition(".")
        if part == "weight" and len(shape) == 2 and ternary.matches(module):
            trits = torch.randint(-1, 2, shape, generator=generator, dtype=torch.int8)
            linears[module] = {"trits": trits, "weight_scale": torch.rand(shape[0], generator=generator).bfloat16()}
            if ternary.column_scale:
                linears[module]["input_scale"] = torch.rand(shape[1], generator=generator).bfloat16()
        elif module in linears:
            linears[module]["bias"] = torch.randn(shape, generator=generator).bfloat16()
        else:
            dense[name] = torch.randn(shape, generator=generator).bfloat16()
    return linears, dense


def write_tiny(out: Path, ternary: TernaryConfig | None = None, max_shard_bytes: int = 1 << 30, seed: int = 0) -> str:
    ternary = ternary or TernaryConfig()
    linears, dense = tiny_tensors(ternary, seed)
    writer = TransformerWriter(out, ternary, "test", max_shard_bytes)
    for name, arguments in linears.items():
        if name not in writer:
            writer.add_linear(name, **arguments)
    for name, tensor in dense.items():
        if name not in writer:
            writer.add_dense(name, tensor)
    return writer.finish(CONFIG)


def folder_bytes(path: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
