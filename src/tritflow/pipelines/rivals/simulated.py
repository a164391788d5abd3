"""Rivals whose own quantizers cannot be called from here: dense stand-ins with the format's rounding and its bits.

They compute in the model's dtype with rounded values, so they say what the format loses, not how fast it runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.pipelines.rivals.registry import RivalError

SUPER_BLOCK = 256
# Weights a block, bits a weight, bits of a block's scale and minimum; fp16 d and dmin a super-block of 256.
_K_QUANTS = {"q2_k": (16, 2, 4), "q4_k": (32, 4, 6)}
_TRIALS = 20


def k_quant(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype, kind: str) -> int:
    """Q2_K or Q4_K: w ~= d sc q - dmin m, with sc and m small integers a block and d and dmin fp16 a super-block.

    Scales and minima come from a search of this project's own (several starts, least squares each), without an
    importance matrix; llama.cpp's own search differs in detail.
    """
    block, bits, scale_bits = _K_QUANTS[kind]
    size = 0
    for name in names:
        linear = _linear(model, name)
        if linear.in_features % SUPER_BLOCK:
            raise RivalError(f"{kind} has super-blocks of {SUPER_BLOCK}, and '{name}' has {linear.in_features} inputs")
        rounded = round_k_quant(linear.weight.detach().float(), block, bits, scale_bits)
        linear.weight.copy_(rounded)
        per_super_block = SUPER_BLOCK * bits + 2 * scale_bits * (SUPER_BLOCK // block) + 2 * 16
        size += linear.weight.numel() // SUPER_BLOCK * per_super_block // 8
    return size


def round_k_quant(weight: Tensor, block: int, bits: int, scale_bits: int) -> Tensor:
    """The values that a k-quant of `weight` [N, K] stands for, fp32."""
    w = weight.reshape(-1, SUPER_BLOCK // block, block)
    top, small = 2**bits - 1, 2**scale_bits - 1
    scale, minimum = _fit_blocks(w, top)
    d = (scale.amax(dim=1, keepdim=True) / small).half().float()
    dmin = (minimum.amax(dim=1, keepdim=True) / small).half().float()
    sc = (scale / d.clamp_min(1e-20)).round().clamp(0, small) * d
    m = (minimum / dmin.clamp_min(1e-20)).round().clamp(0, small) * dmin
    q = ((w + m[..., None]) / sc.clamp_min(1e-20)[..., None]).round().clamp(0, top)
    return (q * sc[..., None] - m[..., None]).reshape(weight.shape)


def _fit_blocks(w: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale s >= 0 and minimum m >= 0 of each block [..., B] for w ~= s q - m, q = 0..top; best of several starts."""
    low, high = w.amin(dim=-1).clamp_max(0.0), w.amax(dim=-1)
    best_scale, best_minimum = torch.zeros_like(low), -low
    best = torch.full_like(low, torch.inf)
    for trial in range(_TRIALS):
        # From a full range to one that clips the extremes.
        shrink = 1.0 - 0.5 * trial / (_TRIALS - 1)
        s = ((high - low) * shrink / top).clamp_min(1e-20)
        m = -low * shrink
        for _ in range(3):
            q = ((w + m[..., None]) / s[..., None]).round().clamp(0, top)
            # Least squares of s and m for these q.
            mean_q, mean_w = q.mean(dim=-1), w.mean(dim=-1)
            variance = (q - mean_q[..., None]).square().mean(dim=-1)
            covariance = ((q - mean_q[..., None]) * (w - mean_w[..., None])).mean(dim=-1)
            s = torch.where(variance > 0, covariance / variance.clamp_min(1e-20), s).clamp_min(1e-20)
            m = (s * mean_q - mean_w).clamp_min(0.0)
            error = (w + m[..., None] - s[..., None] * q).square().sum(dim=-1)
            better = error < best
            best = torch.where(better, error, best)
            best_scale, best_minimum = torch.where(better, s, best_scale), torch.where(better, m, best_minimum)
    return best_scale, best_minimum


# NormalFloat's 16 levels (Dettmers et al., QLoRA, arXiv 2305.14314, appendix E), made from their definition below.
_NF4_OFFSET = 0.9677083
_NF4_BLOCK, _NF4_SUPER = 64, 256


def nf4_levels() -> Tensor:
    """fp32 [16], ascending: quantiles of the normal distribution, 8 from 0 up and 8 down to it, largest 1."""
    normal = torch.distributions.Normal(0.0, 1.0)

    def quantiles(count: int) -> Tensor:
        return normal.icdf(torch.linspace(_NF4_OFFSET, 0.5, count, dtype=torch.float64))[:-1]

    levels = torch.cat([quantiles(9), torch.zeros(1, dtype=torch.float64), -quantiles(8)]).sort().values
    return (levels / levels.max()).float()


def nf4(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype) -> int:
    """NF4 with blocks of 64 whose largest magnitudes are 8-bit themselves, in blocks of 256 around their mean.

    The library's second step has a dynamic 8-bit code; a linear one of as many levels stands for it here.
    """
    size = 0
    for name in names:
        linear = _linear(model, name)
        if linear.weight.numel() % _NF4_BLOCK:
            raise RivalError(f"NF4 has blocks of {_NF4_BLOCK}, and '{name}' has {linear.weight.numel()} weights")
        linear.weight.copy_(round_nf4(linear.weight.detach().float()))
        blocks = linear.weight.numel() // _NF4_BLOCK
        size += linear.weight.numel() // 2 + blocks + 4 * -(-blocks // _NF4_SUPER) + 4
    return size


def round_nf4(weight: Tensor) -> Tensor:
    """The values that NF4 with double quantization gives a weight, fp32 of the same shape."""
    levels = nf4_levels().to(weight.device)
    blocks = weight.reshape(-1, _NF4_BLOCK)
    amax = blocks.abs().amax(dim=1)
    mean = amax.mean()
    padded = torch.nn.functional.pad(amax - mean, (0, -len(amax) % _NF4_SUPER)).view(-1, _NF4_SUPER)
    step = padded.abs().amax(dim=1, keepdim=True).clamp_min(1e-20) / 127
    amax = ((padded / step).round() * step).flatten()[: len(amax)] + mean
    borders = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize((blocks / amax[:, None].clamp_min(1e-20)).contiguous(), borders)
    return (levels[codes] * amax[:, None]).reshape(weight.shape)


def tq2_0(model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype) -> int:
    """TQ2_0: blocks of 256 with an fp16 scale, the largest magnitude, and weights rounded to -1, 0 or 1 of it."""
    size = 0
    for name in names:
        linear = _linear(model, name)
        if linear.in_features % SUPER_BLOCK:
            raise RivalError(f"TQ2_0 has blocks of {SUPER_BLOCK}, and '{name}' has {linear.in_features} inputs")
        linear.weight.copy_(round_tq2_0(linear.weight.detach().float()))
        size += linear.weight.numel() // SUPER_BLOCK * 66
    return size


def round_tq2_0(weight: Tensor) -> Tensor:
    """The values that TQ2_0 gives a weight [N, K], fp32."""
    blocks = weight.reshape(-1, SUPER_BLOCK)
    scale = blocks.abs().amax(dim=1, keepdim=True)
    share = blocks / scale.clamp_min(1e-20)
    trits = share.sign() * (share.abs() + 0.5).floor()  # C's rounding: halves away from zero
    return (trits * scale.half().float()).reshape(weight.shape)


def svdquant(
    model: nn.Module, names: list[str], device: torch.device, dtype: torch.dtype, width_per_rank: int, group_size: int
) -> int:
    """A low-rank 16-bit branch from the weight's SVD, and int4 for the rest and for activations, in groups.

    After SVDQuant (arXiv 2411.05007) without its smoothing and GPTQ. Its rank 32 at hidden 3072 is kept in proportion:
    one rank for every `width_per_rank` of the smaller side.
    """
    size = 0
    for name in names:
        linear = _linear(model, name)
        if linear.in_features % group_size:
            raise RivalError(f"int4 groups of {group_size} do not divide '{name}' with {linear.in_features} inputs")
        rank = max(1, round(min(linear.weight.shape) / width_per_rank))
        layer = LowRankInt4(linear, rank, group_size)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
        n, k = linear.weight.shape
        size += n * k // 2 + 2 * n * k // group_size + 2 * rank * (n + k)
    return size


class LowRankInt4(nn.Module):
    """y = x D^T U^T + int4(x) int4(W - U D)^T + bias; symmetric int4 with one scale a group, fp arithmetic."""

    def __init__(self, linear: nn.Linear, rank: int, group_size: int) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        dtype = linear.weight.dtype
        self.group_size = group_size
        self.register_buffer("up", (u[:, :rank] * s[:rank]).to(dtype))
        self.register_buffer("down", v[:rank].to(dtype))
        rest = weight - self.up.float() @ self.down.float()
        self.register_buffer("residual", int4_groups(rest, group_size).to(dtype))
        self.bias = linear.bias

    up: Tensor
    down: Tensor
    residual: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N]."""
        coarse = int4_groups(x.float(), self.group_size).to(x.dtype)
        return F.linear(F.linear(x, self.down), self.up) + F.linear(coarse, self.residual, self.bias)


def int4_groups(values: Tensor, group_size: int) -> Tensor:
    """Symmetric int4 (-7..7) of [..., K] with one scale in every `group_size` along K, dequantized."""
    groups = values.reshape(*values.shape[:-1], -1, group_size)
    scale = groups.abs().amax(dim=-1, keepdim=True).clamp_min(1e-20) / 7.0
    return ((groups / scale).round().clamp(-7, 7) * scale).reshape(values.shape)


def _linear(model: nn.Module, name: str) -> Any:
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    return linear
