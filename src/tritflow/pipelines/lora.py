"""LoRA on ternary transformers: adapters stay beside the ternary weights, and are never fused into them.

Loading, weighing, disabling and unloading are diffusers' and peft's own: a `TernaryLinear` is an `nn.Linear` of the
logical shape, so peft adds `scaling * B(A(x))` to its output and never touches its bits.
"""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn


class LoraError(ValueError):
    """What was asked of a LoRA cannot be done on ternary weights. Says what can."""


def refuse_to_fuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `fuse_lora` of ternary models: a ternary weight plus a low-rank update is not ternary.

    Raises:
        LoraError: always, before any layer is changed.
    """
    raise LoraError(
        "a LoRA cannot be fused into ternary weights; leave it loaded (set_adapters weighs it, at a small cost a "
        "step), or call transformer.dequantize() first for a dense model"
    )


def forbid_fusing_(model: nn.Module) -> None:
    """Make `model.fuse_lora`, which pipelines call, refuse in one line.

    peft would add the update to the packed bytes, layer by layer, until one of them does not fit.
    """
    model.fuse_lora = refuse_to_fuse  # type: ignore[assignment]


def allow_fusing_(model: nn.Module) -> None:
    """Undo `forbid_fusing_`; a model that was never forbidden is left as it is."""
    model.__dict__.pop("fuse_lora", None)
