"""What a GPU without kernels of its own costs: said in one line when a ternary model is put on it."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from tritflow.kernels.backends import fallback
from tritflow.modules import TernaryLinear

_TOKENS, _FEATURES = 1024, 3072  # of the product that is timed: a quarter of a picture, FLUX.1's width


class FallbackWarning(UserWarning):
    """Ternary layers run on the reference, since the GPU cannot run the kernels."""


def warn_of_fallback(model: Any, device: torch.device) -> None:
    """Warn, once a device and mode, if a model's ternary layers have nothing faster than the reference there."""
    module = getattr(model, "transformer", model)
    modes = {m.mode for m in module.modules() if isinstance(m, TernaryLinear) and m.backend == "auto"}
    if modes and fallback(device) is not None:
        for mode in sorted(modes):
            warnings.warn(_line(device, mode), FallbackWarning, stacklevel=3)


@cache
def _line(device: torch.device, mode: str) -> str:
    times = slowdown(device, mode)
    name = torch.cuda.get_device_name(device)
    return (
        f"{name} cannot run tritflow's GPU kernels ({fallback(device)}): ternary layers fall back to plain PyTorch "
        f"('reference'), which took {times:.1f} times as long as a dense bf16 layer just now ({mode}, "
        f"{_TOKENS} tokens, {_FEATURES} features); memory is saved all the same"
    )


@torch.no_grad()
def slowdown(device: torch.device, mode: str) -> float:
    """How many times as long as a dense bf16 layer a ternary one takes by the reference, measured here.

    Args:
        device: where to measure; some 50 MB of its memory.
        mode: `w2a16` or `w2a8`.
    """
    x = torch.randn(_TOKENS, _FEATURES, device=device).bfloat16()
    weight = torch.randn(_FEATURES, _FEATURES, device=device).bfloat16()
    ternary = TernaryLinear(_FEATURES, _FEATURES, mode=mode, backend="reference", device=device)  # type: ignore[arg-type]
    ternary.register_parameter("bias", None)

    def seconds(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])

    return seconds(lambda: ternary(x)) / seconds(lambda: F.linear(x, weight))
