"""GPTQ at few bits, computed here: no library of it runs on a diffusion transformer.

GPTQ (arXiv 2210.17323, algorithm 1) on a uniform grid: columns are rounded in order, what is lost goes onto the columns
still to come, and each group of columns takes scale and zero point from what its weights are by then. Blocks are
rounded one after the other, each on the inputs that the blocks rounded before it give in the pipeline's own sampling.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.prompts import load_prompts
from tritflow.calibration.watching import watched
from tritflow.models import family_of
from tritflow.pipelines.loading import GenerationDefaults
from tritflow.pipelines.rivals.registry import RivalError
from tritflow.quantization.compensate import InputStatistics, inverse_factor

PROMPTS = "calibration_prompts.txt"
# Shares of a group's range that are tried for its grid: at two bits the whole range wastes levels on one weight.
_RANGES = 20


def gptq(
    model: nn.Module,
    names: list[str],
    device: torch.device,
    dtype: torch.dtype,
    pipe: Any,
    folder: str,
    bits: int,
    group_size: int,
    prompts: int,
) -> int:
    """Round the linears in place; see `Rival.apply`.

    Args:
        pipe: the pipeline around `model`.
        folder: of the pipeline, whose calibration prompts are drawn (to latents alone).
        bits, group_size: of the grid: a 16-bit scale and a zero point of `bits` bits a group.
        prompts: how many trajectories inputs come from.
    """
    wide = next((n for n in names if _linear(model, n).in_features % group_size), None)
    if wide is not None:
        raise RivalError(
            f"groups of {group_size} do not divide '{wide}' with {_linear(model, wide).in_features} inputs"
        )
    path = Path(folder) / PROMPTS
    if not path.is_file():
        raise RivalError(f"GPTQ calibrates on {PROMPTS} of the model folder, and {folder} has none; write one")
    texts = load_prompts(path).texts[:prompts]
    config: dict[str, Any] = {"_class_name": type(model).__name__, **pipe.transformer.config}
    size = 0
    for block in family_of(config).block_order(config):
        inside = [n for n in names if n.startswith(f"{block}.")]
        found = {n: InputStatistics.empty(_linear(model, n).in_features, device) for n in inside}
        if inside:
            with watched({n: _linear(model, n) for n in inside}, _add_to(found)):
                _sample(pipe, folder, texts)
        for name in inside:
            linear = _linear(model, name)
            linear.weight.copy_(round_gptq(linear.weight.detach(), found[name].hessian(), bits, group_size))
            n, k = linear.weight.shape
            size += n * (k * bits + k // group_size * (16 + bits)) // 8
    return size


def round_gptq(weight: Tensor, hessian: Tensor, bits: int, group_size: int, damping: float = 0.01) -> Tensor:
    """What GPTQ makes of a weight [N, K] under H = E[x x^T] [K, K]: its values on the grid, fp32."""
    seen = float(hessian.diagonal().mean())
    w_KN = weight.float().T.contiguous()
    if seen <= 0:
        raise RivalError("a linear saw nothing but zeros: GPTQ has nothing to calibrate on")
    upper, _ = inverse_factor(hessian.to(w_KN.device), damping * seen)
    pivots = upper.diagonal().tolist()
    out_KN = torch.empty_like(w_KN)
    for start in range(0, len(w_KN), group_size):
        stop = start + group_size
        step, zero = grid(w_KN[start:stop].T, bits)
        lost_BN = torch.empty_like(w_KN[start:stop])
        for i in range(start, stop):
            q = ((w_KN[i] / step).round_() + zero).clamp_(0, 2**bits - 1)
            out_KN[i] = (q - zero) * step
            lost_BN[i - start] = (w_KN[i] - out_KN[i]) / pivots[i]
            w_KN[i:stop].addr_(upper[i, i:stop], lost_BN[i - start], alpha=-1)
        w_KN[stop:].addmm_(upper[start:stop, stop:].T, lost_BN, alpha=-1)
    return out_KN.T.contiguous()


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step (fp16 value) and whole zero point, fp32 [N] each, of rows [N, G]: the share of the range that errs least."""
    top = 2**bits - 1
    low, high = weight.amin(dim=1).clamp_max(0.0), weight.amax(dim=1).clamp_min(0.0)
    best = torch.full_like(low, torch.inf)
    best_step, best_zero = torch.ones_like(low), torch.zeros_like(low)
    for trial in range(_RANGES):
        share = 1.0 - 0.6 * trial / (_RANGES - 1)
        step = ((high - low) * share / top).half().float().clamp_min(6e-8)
        zero = (-low * share / step).round().clamp(0, top)
        q = ((weight / step[:, None]).round() + zero[:, None]).clamp(0, top)
        error = ((q - zero[:, None]) * step[:, None] - weight).square().sum(dim=1)
        better = error < best
        best = torch.where(better, error, best)
        best_step, best_zero = torch.where(better, step, best_step), torch.where(better, zero, best_zero)
    return best_step, best_zero


def _sample(pipe: Any, folder: str, texts: list[str], batch: int = 32) -> None:
    defaults = GenerationDefaults.read(Path(folder))
    for start in range(0, len(texts), batch):
        some = texts[start : start + batch]
        pipe(
            prompt=some,
            height=defaults.height,
            width=defaults.width,
            num_inference_steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            max_sequence_length=defaults.max_sequence_length,
            generator=[torch.Generator().manual_seed(1_000_003 + start + i) for i in range(len(some))],
            output_type="latent",
        )


def _add_to(found: dict[str, InputStatistics]) -> Callable[[str, Tensor], None]:
    return lambda name, x: found[name].add(x)


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
