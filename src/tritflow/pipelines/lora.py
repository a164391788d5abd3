"""LoRA on ternary transformers: adapters stay beside the ternary weights, and are never fused into them.

Loading, weighing, disabling and unloading are diffusers' and peft's own: a `TernaryLinear` is an `nn.Linear` of the
logical shape, so peft adds `scaling * B(A(x))` to its output and never touches its bits. Two methods of a ternary
model are replaced on the instance: `load_lora_adapter`, which every `load_lora_weights` ends in, and `fuse_lora`.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

from torch import nn


class LoraError(ValueError):
    """What was asked of a LoRA cannot be done on ternary weights. Says what can."""


def refuse_to_fuse(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for `fuse_lora` of ternary models: a ternary weight plus a low-rank update is not ternary.

    peft would add the update to the packed bytes, layer by layer, until one of them does not fit.

    Raises:
        LoraError: always, before any layer is changed.
    """
    raise LoraError(
        "a LoRA cannot be fused into ternary weights; leave it loaded (set_adapters weighs it, at a small cost a "
        "step), or call transformer.dequantize() first for a dense model"
    )


def load_and_adopt(model: Any, *args: Any, **kwargs: Any) -> None:
    """Stands in for `load_lora_adapter` of ternary models: diffusers' own, then peft's layers made faster."""
    type(model).load_lora_adapter(model, *args, **kwargs)
    from tritflow.pipelines.lora_layer import adopt_  # peft is there if a LoRA was loaded

    adopt_(model)


def prepare_for_lora_(model: nn.Module) -> None:
    """Replace both methods on a diffusers model that has become ternary."""
    if hasattr(type(model), "load_lora_adapter"):
        # Partials, because a copy of the model must load into itself.
        model.load_lora_adapter = functools.partial(load_and_adopt, model)  # type: ignore[assignment]
        model.fuse_lora = refuse_to_fuse  # type: ignore[assignment]


def release_from_lora_(model: nn.Module) -> None:
    """Undo `prepare_for_lora_`, for a model that is dense again."""
    for name in ("load_lora_adapter", "fuse_lora"):
        model.__dict__.pop(name, None)
