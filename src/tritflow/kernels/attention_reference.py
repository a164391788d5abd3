"""8-bit attention in plain PyTorch: the registered fallback, and what the kernels are tested against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE, qk_norm_rope

BLOCK = 128
"""Keys, and values, that share one scale."""
SAMPLE = 16
"""Keys whose mean is subtracted from all keys of a head, which changes no result but takes away what they share."""
E4M3_MAX = 448.0
V_FLOOR = 2.0**-50
"""Blocks of values are not scaled up beyond this largest magnitude: the sums of weights divide by the scale."""
_ROWS = 1024  # queries at a time


def sampled(tokens: int) -> list[int]:
    """Which keys are averaged: `SAMPLE` of them, evenly spread."""
    return [i * tokens // SAMPLE for i in range(SAMPLE)]


def _round(x: Tensor, dtype: str) -> Tensor:
    return x.round() if dtype == "int8" else x.to(QTYPE[dtype]).float()


def quantize_keys(k: Tensor, dtype: str) -> Tensor:
    """Keys [B, S, H, D], less a sample's mean, rounded to 8 bits with one scale a head and block; float32."""
    x = k.float()
    x = x - x[:, sampled(k.shape[1])].mean(1, keepdim=True)
    parts = []
    for block in x.split(BLOCK, 1):
        scale = block.abs().amax((1, 3), keepdim=True).clamp_min(AMAX_FLOOR) / QMAX[dtype]
        parts.append(_round(block / scale, dtype) * scale)
    return torch.cat(parts, 1)


def quantize_values(v: Tensor) -> tuple[Tensor, Tensor]:
    """Values [B, S, H, D] in e4m3, and log2 of their scale, a whole number, by head and block: both float32.

    The second is [B, H, S]: one number for each key. The first is what e4m3 holds, not multiplied by the scale.
    """
    parts, exponents = [], []
    for block in v.float().split(BLOCK, 1):
        amax = block.abs().amax((1, 3), keepdim=True).clamp_min(V_FLOOR)
        exponent = torch.log2(amax / E4M3_MAX).ceil()
        parts.append((block * torch.exp2(-exponent)).to(torch.float8_e4m3fn).float())
        exponents.append(exponent[..., 0].transpose(1, 2).expand(-1, -1, block.shape[1]))
    return torch.cat(parts, 1), torch.cat(exponents, 2)


def normed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None,
    context_k: Tensor | None,
    context_v: Tensor | None,
    context_q_weight: Tensor | None,
    context_k_weight: Tensor | None,
    eps: float,
    dtype: str,
    scale: float | None,
) -> Tensor:
    """See `attention_op.normed_attention`: `qk_norm_rope`, then `attention`, rounded once, at the end."""
    if cos.shape[1] != q.shape[-1]:
        cos, sin = (t.repeat_interleave(2, dim=1) for t in (cos, sin))
    context: list[Tensor | None] = [None if t is None else t.float() for t in (context_q, context_k)]
    context += [context_q_weight, context_k_weight]
    args: tuple[Any, ...] = (q.float(), k.float(), q_weight, k_weight, cos, sin, *context, eps)
    queries, keys = qk_norm_rope(*args)
    values = v if context_v is None else torch.cat([context_v, v], dim=1)
    return attention(queries, keys, values.float(), dtype, scale).to(q.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None) -> Tensor:
    """See `attention_op.attention`; float32 throughout but for the roundings to 8 bits."""
    if not q.numel():
        return torch.empty_like(q)
    factor = (q.shape[-1] ** -0.5 if scale is None else scale) * math.log2(math.e)
    keys = quantize_keys(k, dtype).permute(0, 2, 3, 1)
    values, exponents = quantize_values(v)
    values = values.transpose(1, 2)
    out = torch.empty_like(q)
    for first in range(0, q.shape[1], _ROWS):
        x = q[:, first : first + _ROWS].transpose(1, 2).float()
        row = x.abs().amax(-1, keepdim=True).clamp_min(AMAX_FLOOR) / QMAX[dtype]
        # A value's scale is a factor of its weight, so it counts where the largest weight is looked for.
        logits = (_round(x / row, dtype) @ keys) * (row * factor) + exponents[:, :, None]
        weights = torch.exp2(logits - logits.amax(-1, keepdim=True).ceil() + 8)
        sums = (weights * torch.exp2(-exponents)[:, :, None]).sum(-1, keepdim=True)
        y = weights.to(torch.float8_e4m3fn).float() @ values / sums
        out[:, first : first + _ROWS] = y.transpose(1, 2).to(q.dtype)
    return out
