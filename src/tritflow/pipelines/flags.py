"""Which path a model runs on, as results record it: one function, so that paths timed and scored can be compared."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any

import torch

from tritflow.kernels import tuning
from tritflow.models.flux1_blocks import ATTENTIONS
from tritflow.modules import TernaryLinear

_NAMES = {function: name for name, function in ATTENTIONS.items()}


def flags(pipe: Any, device: str | torch.device | None = None) -> dict[str, Any]:
    """What decides which kernels a model's transformer runs on.

    Args:
        pipe: a pipeline, or a transformer alone; dense or ternary, optimized or not.
        device: where it runs; by default where its tensors are.

    Returns:
        `mode`, `activation_dtype` and `backend` of the ternary layers (those of most of them, and `mixed` if not all
        are alike; None for a dense model); `attention`: `16bit`, `int8`, `fp8`, or a function's name, of the optimized
        forward, else `diffusers`; `optimized` and its options `offload_modulation` and `cuda_graph`, None without it;
        `compiled`: whether blocks are; `tuned`: SHA-256 of the tuned choices for this GPU, None where there are none.
    """
    model = getattr(pipe, "transformer", pipe)
    fused = model.__dict__.get("_tritflow_fused")
    kinds = Counter(
        (m.mode, m.activation_dtype, m.backend) for m in model.modules() if isinstance(m, TernaryLinear)
    ).most_common()
    mode, activation_dtype, backend = kinds[0][0] if kinds else (None, None, None)
    on = torch.device(device) if device is not None else model.proj_out.weight.device
    return {
        "mode": mode,
        "activation_dtype": activation_dtype if mode == "w2a8" else None,
        "backend": backend,
        "mixed": len(kinds) > 1,
        "attention": "diffusers" if fused is None else _attention(fused.attention),
        "optimized": fused is not None,
        "offload_modulation": None if fused is None else fused.offload_modulation,
        "cuda_graph": None if fused is None else fused.graph is not None,
        "compiled": any("_compiled_call_impl" in m.__dict__ and m._compiled_call_impl for m in model.modules()),
        "tuned": tuned_hash(on),
    }


def _attention(function: Any) -> str:
    if function in _NAMES:
        return _NAMES[function]
    arguments = getattr(function, "keywords", {})
    name = getattr(getattr(function, "func", function), "__name__", type(function).__name__)
    return " ".join([name, *(f"{key}={value}" for key, value in sorted(arguments.items()))])


def tuned_hash(device: torch.device) -> str | None:
    """First 16 hex digits of the SHA-256 over the tuned choices in force for a GPU, shipped ones and the user's own."""
    if device.type != "cuda":
        return None
    file = f"{tuning.slug(torch.cuda.get_device_name(device))}.json"
    entries = tuning.read(tuning.FOLDER / file) | tuning.read(tuning.cache_folder() / file)
    if not entries:
        return None
    text = "\n".join(f"{name} {entries[name].label}" for name in sorted(entries))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def changed(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Every flag in which two paths differ, with both values."""
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """One line for every flag in which two paths differ; empty: the path that was timed is the path that was scored."""
    return [f"{key}: {one} and {other}" for key, one, other in changed(a, b)]
