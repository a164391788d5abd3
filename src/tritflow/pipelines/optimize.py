"""`tritflow.optimize(pipe)`: the one explicit call that trades a pipeline's stock forward for the fused one."""

from __future__ import annotations

from typing import Any

import torch

from tritflow.models.flux1_blocks import Attend, attend
from tritflow.models.flux1_fused import FusedFlux1, why_not
from tritflow.pipelines.loading import ModelError

_ATTRIBUTE = "_tritflow_fused"


class OptimizeError(ModelError):
    """The fused forward cannot be used on this model. Says why and what to do."""


def optimize(
    pipe: Any,
    *,
    device: str | torch.device | None = None,
    scheduler: Any = None,
    offload_modulation: bool = True,
    cuda_graph: bool = True,
    attention: Attend | str = attend,
) -> Any:
    """Run a pipeline's ternary transformer on fused operations, in place.

    Query, key and value become one product, activations are quantized once for all layers that read them, every
    step's modulation is computed before the first step and its weights leave the GPU, and a step is replayed as one
    CUDA graph. Nothing stored changes; `deoptimize` undoes it. LoRAs may be loaded, weighed and unloaded before and
    after. What the fused forward does not know (other adapters, ControlNet, IP-Adapter, gradients) takes the stock
    forward of diffusers, with one line in the log.

    Call it before offloading is switched on, when the pipeline is on its device, or with `device`.

    Args:
        pipe: a pipeline with `transformer` and `scheduler`, or a `FluxTransformer2DModel` alone.
        device: move `pipe` there first, but for the modulation layers if they are to be offloaded: they then never
            take memory there all at once.
        scheduler: whose `timesteps` tell the steps of a generation; by default the pipeline's. Without one, each
            step computes its own modulation.
        offload_modulation: on CUDA, keep the modulation layers in host memory.
        cuda_graph: on CUDA, replay each step as a graph; the first two steps of a new size are slower.
        attention: computes attention on [B, S, H, D] tensors; PyTorch's by default. `int8` and `fp8` name
            `tritflow.kernels.attention`, which is faster on large pictures and errs by some percent.

    Returns:
        `pipe`.

    Raises:
        ValueError: an unknown attention.
        OptimizeError: the model is dense, of another family, hooked (offloading), training, or has an adapter loaded
            that is more than a LoRA (DoRA, LoHa, ...).
    """
    transformer = getattr(pipe, "transformer", pipe)
    if _ATTRIBUTE in transformer.__dict__:
        deoptimize(pipe)
    reason = "its forward is wrapped already (offloading?)" if "forward" in transformer.__dict__ else None
    reason = reason or why_not(transformer)
    if reason is not None:
        raise OptimizeError(f"optimize: this model keeps its stock forward: {reason}")
    if device is not None:
        _move(pipe, transformer, torch.device(device), offload_modulation)
    fused = FusedFlux1(
        transformer,
        getattr(pipe, "scheduler", None) if scheduler is None else scheduler,
        offload_modulation=offload_modulation,
        cuda_graph=cuda_graph,
        attention=attention,
    )
    transformer.__dict__[_ATTRIBUTE] = fused
    transformer.__dict__["forward"] = fused.forward
    return pipe


def _move(pipe: Any, transformer: Any, device: torch.device, offload_modulation: bool) -> None:
    """`pipe.to(device)`, the modulation layers left where they are if they are to be offloaded."""
    held = [(block, name, getattr(block, name).linear) for block, name in _norms(transformer)]
    if offload_modulation and device.type == "cuda":
        for block, name, _ in held:
            getattr(block, name).linear = torch.nn.Identity()
    try:
        pipe.to(device)
    finally:
        for block, name, linear in held:
            getattr(block, name).linear = linear


def _norms(transformer: Any) -> list[tuple[Any, str]]:
    doubles = [(block, name) for block in transformer.transformer_blocks for name in ("norm1", "norm1_context")]
    return doubles + [(block, "norm") for block in transformer.single_transformer_blocks]


def deoptimize(pipe: Any) -> Any:
    """Give a pipeline its stock forward back; a pipeline that was never optimized stays as it is.

    Args:
        pipe: what `optimize` was called with.

    Returns:
        `pipe`.
    """
    transformer = getattr(pipe, "transformer", pipe)
    fused = transformer.__dict__.pop(_ATTRIBUTE, None)
    if fused is not None:
        transformer.__dict__.pop("forward", None)
        fused.release()
    return pipe


def is_optimized(pipe: Any) -> bool:
    """Whether `optimize` is in effect."""
    return _ATTRIBUTE in getattr(pipe, "transformer", pipe).__dict__
