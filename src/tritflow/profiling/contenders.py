"""Who takes part in the bench of the transformer's step, how each is built, and what all are given."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

STEPS = 28  # of the schedule whose modulation is computed up front
TEXT_TOKENS = 512


def _optimized(mode: str, backend: str, dtype: str = "int8", **more: Any) -> dict[str, Any]:
    return {"kind": "ternary", "mode": mode, "dtype": dtype, "backend": backend, "fused": True, **more}


_FP8 = "float8_e4m3fn"
CONTENDERS: dict[str, dict[str, Any]] = {
    "bf16 eager": {"kind": "dense"},
    "bf16 compiled": {"kind": "dense", "compiled": True},
    "W2A8 fp8 optimized, scratch": _optimized("w2a8", "scratch", _FP8),
    "W2A8 fp8 optimized, scratch, no graph": _optimized("w2a8", "scratch", _FP8, graph=False),
    "W2A8 fp8 optimized, triton": _optimized("w2a8", "triton", _FP8),
    "W2A8 int8 optimized, triton": _optimized("w2a8", "triton"),
    "W2A8 int8 optimized, hopper": _optimized("w2a8", "hopper"),
    "W2A8 fp8 optimized, hopper": _optimized("w2a8", "hopper", _FP8),
    "W2A8 int8 optimized, hopper, int8 attention": _optimized("w2a8", "hopper", attention=("int8", "triton")),
    "W2A8 int8 optimized, hopper, int8 hopper attention": _optimized("w2a8", "hopper", attention=("int8", "hopper")),
    "W2A8 int8 optimized, hopper, fp8 hopper attention": _optimized("w2a8", "hopper", attention=(_FP8, "hopper")),
    "W2A8 int8 optimized": _optimized("w2a8", "auto"),
    "W2A8 int8 optimized, LoRA r16": _optimized("w2a8", "auto", lora=16),
    "fp8 compiled": {"kind": "fp8", "compiled": True},
    "W2A8 int8 stock": {"kind": "ternary", "dtype": "int8", "backend": "auto"},
    "W2A16 optimized, scratch": _optimized("w2a16", "scratch"),
    "W2A16 optimized, hopper": _optimized("w2a16", "hopper"),
    "W2A16 optimized, triton": _optimized("w2a16", "triton"),
    "W2A8 fp8 optimized, LoRA r16": _optimized("w2a8", "auto", _FP8, lora=16),
    "W2A16 optimized, LoRA r16": _optimized("w2a16", "auto", lora=16),
    "W2A16 stock": {"kind": "ternary", "mode": "w2a16", "backend": "auto"},
}
"""In the order of their importance, should the time run out."""


class Schedule:
    """As much of a sampler as the fused forward looks at."""

    def __init__(self, steps: int, device: str) -> None:
        self.timesteps = torch.linspace(1000, 1000 / steps, steps, device=device)


def step_inputs(
    config: Mapping[str, Any], size: int, batch: int, device: str, dtype: torch.dtype, text_tokens: int = TEXT_TOKENS
) -> dict[str, Any]:
    """Random keyword arguments of one forward for pictures of `size` x `size` pixels, but for the timestep."""
    side = size // 16

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    img_ids = torch.zeros(side, side, 3, device=device, dtype=dtype)
    img_ids[..., 1] = torch.arange(side, device=device)[:, None]
    img_ids[..., 2] = torch.arange(side, device=device)[None]
    return {
        "hidden_states": normal(batch, side * side, config["in_channels"]),
        "encoder_hidden_states": normal(batch, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": normal(batch, config["pooled_projection_dim"]),
        "guidance": torch.full((batch,), 3.5, device=device),
        "txt_ids": torch.zeros(text_tokens, 3, device=device, dtype=dtype),
        "img_ids": img_ids.reshape(-1, 3),
        "return_dict": False,
    }


def set_attention(name: str) -> None:
    """Restrict PyTorch's attention to one kernel: `cudnn`, `flash`, or `default` for its own choice."""
    if name not in ("cudnn", "flash", "default"):
        raise ValueError(f"unknown attention '{name}'; use cudnn, flash or default")
    torch.backends.cuda.enable_cudnn_sdp(name in ("cudnn", "default"))
    torch.backends.cuda.enable_flash_sdp(name in ("flash", "default"))
    torch.backends.cuda.enable_mem_efficient_sdp(name == "default")


def build(settings: Mapping[str, Any], config: Mapping[str, Any], device: str) -> Any:
    """The contender's transformer, compiled or optimized if it is to be."""
    from tritflow.kernels import attention
    from tritflow.models.flux1 import is_modulation
    from tritflow.models.flux1_blocks import attend
    from tritflow.pipelines import synthetic
    from tritflow.pipelines.optimize import optimize

    if settings["kind"] == "dense":
        model = synthetic.random_dense(config, device)
    elif settings["kind"] == "fp8":
        model = dense_fp8(config, device)
    else:
        fused = settings.get("fused", False)
        model = synthetic.random_ternary(
            config,
            device,
            mode=settings.get("mode", "w2a8"),
            activation_dtype=settings.get("dtype", "int8"),
            backend=settings["backend"],
            modulation_device="cpu" if fused and device != "cpu" else None,
        )
        for name, module in model.named_modules():
            if is_modulation(name):
                module.backend = "auto"  # a few rows are no matter for a backend that was chosen for thousands
        if fused:
            kind, where = settings.get("attention") or ("", "")
            optimize(
                model,
                scheduler=Schedule(STEPS, device),
                cuda_graph=settings.get("graph", True),
                attention=partial(attention, dtype=kind, backend=where) if kind else attend,
            )
    if settings.get("compiled"):
        model.compile_repeated_blocks(fullgraph=True)
    return model


def dense_fp8(config: Mapping[str, Any], device: str) -> Any:
    """Block linears as dense e4m3, modulation in bf16."""
    from tritflow.config import TernaryConfig
    from tritflow.models.flux1 import is_modulation
    from tritflow.pipelines import synthetic
    from tritflow.profiling.dense_fp8 import DenseFp8Linear

    targets, model = TernaryConfig(), synthetic.on_meta(config)
    synthetic.replace_(
        model,
        lambda name, _: targets.matches(name) and not is_modulation(name),
        lambda name, linear: DenseFp8Linear(linear.in_features, linear.out_features, "meta"),
        device,
    )
    return model
