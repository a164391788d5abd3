"""peft's LoRA layer on a ternary one: the same sum in one pass over the output, and no merging."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from tritflow.modules import TernaryLinear
from tritflow.pipelines.lora import refuse_to_fuse


class TernaryLora(LoraLinear):
    """What peft's own layer becomes by `adopt_`; everything but `forward` and `merge` is peft's.

    `y = base(x) + sum_i scaling_i * B_i(A_i(x))`. peft writes each product, its scaled copy and each sum to memory;
    here `addmm_` adds to the base layer's output in place, and rounds once. Whatever is not plain inference (training,
    dropout, other variants, mixed batches, weights that hooks have yet to bring) takes peft's way.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., K] to [..., N] in x.dtype."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or not self._is_plain(x, names):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        base: Any = self.base_layer
        result: Tensor = base(x)
        rows = result.view(-1, result.shape[-1])
        for name in names:
            down: Any = self.lora_A[name]
            up: Any = self.lora_B[name]
            rows.addmm_(down(x).reshape(-1, down.out_features), up.weight.t(), alpha=self.scaling[name])
        return result

    def _is_plain(self, x: Tensor, names: list[str]) -> bool:
        return (
            not torch.is_grad_enabled()
            and not self.disable_adapters
            and not self.merged
            and x.numel() > 0
            and all(
                isinstance(self.lora_dropout[name], nn.Identity)
                and name not in self.lora_variant
                and self.lora_B[name].bias is None
                and self.lora_A[name].weight.dtype == self.lora_B[name].weight.dtype == x.dtype
                and self.lora_B[name].weight.device == x.device
                for name in names
            )
        )

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """As peft's where the base layer has become dense. Raises `LoraError` where it is ternary."""
        if isinstance(self.get_base_layer(), TernaryLinear):
            refuse_to_fuse()
        super().merge(safe_merge, adapter_names)


def adopt_(model: nn.Module) -> int:
    """Turn peft's layers over ternary ones into `TernaryLora`s, in place. Returns how many there were."""
    adopted = 0
    for module in model.modules():
        # Exactly this class: a subclass of peft's has a forward of its own.
        if type(module) is LoraLinear and isinstance(module.get_base_layer(), TernaryLinear):
            module.__class__ = TernaryLora
            adopted += 1
    return adopted
