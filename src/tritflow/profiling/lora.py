"""What a loaded LoRA costs a step: the same model without, with, and without it again, in one process.

The adapter is random and of the kind that ordinary FLUX LoRAs are: all attention projections and both feed-forward
layers of both block types, text stream included, modulation not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from tritflow.profiling.latency import quantiles
from tritflow.profiling.step_times import timed

TARGETS = (
    r"(single_)?transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|proj_mlp|proj_out)"
)
"""Full names of the layers, as peft takes them."""
_NAME = "bench"
_STRENGTH = 0.1  # of the second factor against what keeps the size of activations


@torch.no_grad()
def load_(model: Any, rank: int, seed: int = 0) -> dict[str, int]:
    """Give a FLUX.1 transformer a random adapter, as `load_lora_weights` would. Returns how many layers and bytes."""
    from peft import LoraConfig

    from tritflow.pipelines.lora_layer import adopt_

    dtype = model.dtype
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS), adapter_name=_NAME)
    g = torch.Generator().manual_seed(seed)
    size = layers = 0
    for name, parameter in model.named_parameters():
        if f".{_NAME}." not in name:
            continue
        deviation = parameter.shape[1] ** -0.5 if ".lora_A." in name else _STRENGTH * rank**-0.5
        values = torch.randn(parameter.shape, generator=g) * deviation
        parameter.data = values.to(parameter.device, dtype)
        size, layers = size + parameter.nbytes, layers + (".lora_A." in name)
    model.requires_grad_(False).eval()
    adopt_(model)
    return {"layers": layers, "bytes": size}


class Beside:
    """Times without the adapter around those with it: made before, `finish`ed after, loaded in between.

    Args:
        model: the transformer that `step` runs.
        step: one step.
        rank: of the adapter.
        count: timed steps.
    """

    def __init__(self, model: Any, step: Callable[[], Tensor], rank: int, count: int) -> None:
        self.model, self.step, self.rank, self.count = model, step, rank, count
        self.before = quantiles(timed(step, count, 3))
        self.loaded = load_(model, rank)

    def finish(self, with_it: Mapping[str, float]) -> dict[str, Any]:
        """Unload, time again, compare.

        Args:
            with_it: quantiles of milliseconds with the adapter.

        Returns:
            `slowdown` as a share: the median with it over the mean of the two medians without, less one.
        """
        self.model.unload_lora()
        after = quantiles(timed(self.step, self.count, 3))
        without = (self.before["p50"] + after["p50"]) / 2
        return {
            "rank": self.rank,
            **self.loaded,
            "targets": TARGETS,
            "milliseconds": dict(with_it),
            "without": {"before": self.before, "after": after, "p50": round(without, 4)},
            "slowdown": round(with_it["p50"] / without - 1, 5),
        }


def line(result: Mapping[str, Any]) -> str:
    """The comparison in one line."""
    return (
        f"LoRA of rank {result['rank']} on {result['layers']} layers: {100 * result['slowdown']:+.1f} % "
        f"({result['without']['p50']:.2f} ms without)"
    )
