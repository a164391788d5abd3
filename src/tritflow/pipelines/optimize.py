"""`tritflow.optimize(pipe)`: the one explicit call that trades a pipeline's stock forward for the fused one."""

from __future__ import annotations

from typing import Any

from tritflow.models.flux1_fused import Attend, FusedFlux1, attend, why_not
from tritflow.pipelines.loading import ModelError

_ATTRIBUTE = "_tritflow_fused"


class OptimizeError(ModelError):
    """The fused forward cannot be used on this model. Says why and what to do."""


def optimize(
    pipe: Any,
    *,
    offload_modulation: bool = True,
    cuda_graph: bool = True,
    attention: Attend = attend,
) -> Any:
    """Run a pipeline's ternary transformer on fused operations, in place.

    Query, key and value become one product, activations are quantized once for all layers that read them, every
    step's modulation is computed before the first step and its weights leave the GPU, and a step is replayed as one
    CUDA graph. Nothing stored changes; `deoptimize` undoes it. What the fused forward does not know (LoRA,
    ControlNet, IP-Adapter, gradients) takes the stock forward of diffusers, with one line in the log.

    Call it when the pipeline is on its device and before offloading is switched on.

    Args:
        pipe: a pipeline with `transformer` and `scheduler`, or a `FluxTransformer2DModel` alone (whose modulation is
            then computed step by step).
        offload_modulation: on CUDA, keep the modulation layers in host memory.
        cuda_graph: on CUDA, replay each step as a graph; the first two steps of a new size are slower.
        attention: computes attention on [B, S, H, D] tensors; PyTorch's by default.

    Returns:
        `pipe`.

    Raises:
        OptimizeError: the model is dense, of another family, hooked (offloading), training, or has a LoRA loaded.
    """
    transformer = getattr(pipe, "transformer", pipe)
    if _ATTRIBUTE in transformer.__dict__:
        deoptimize(pipe)
    reason = "its forward is wrapped already (offloading?)" if "forward" in transformer.__dict__ else None
    reason = reason or why_not(transformer)
    if reason is not None:
        raise OptimizeError(f"optimize: this model keeps its stock forward: {reason}")
    fused = FusedFlux1(
        transformer,
        getattr(pipe, "scheduler", None),
        offload_modulation=offload_modulation,
        cuda_graph=cuda_graph,
        attention=attention,
    )
    transformer.__dict__[_ATTRIBUTE] = fused
    transformer.__dict__["forward"] = fused.forward
    return pipe


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
