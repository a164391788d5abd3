"""RMS norm and rotary embedding of queries and keys in one pass: see `block_ops.qk_norm_rope`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels.triton.block import contiguous_features

_HEADS = 8  # of one program


@triton.jit
def _normed_and_turned(
    x_ptr, weight_ptr, stride_h, head, d, inside, c0, c1, s0, s1, EPS: tl.constexpr, D: tl.constexpr
):
    """[HEADS, D'] of one token: RMS norm, weight, rotation of neighbouring pairs; D' is D's next power of two."""
    x = tl.load(x_ptr + head[:, None] * stride_h + d[None, :], mask=inside, other=0).to(tl.float32)
    rrms = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + EPS)
    x = x * rrms[:, None] * tl.load(weight_ptr + d, mask=d < D, other=0).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    turned = tl.join(even * c0 - odd * s0, odd * c1 + even * s1)
    return tl.reshape(turned, (x.shape[0], x.shape[1]))


@triton.jit
def qk_norm_rope_kernel(
    q_ptr,
    k_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    context_q_ptr,
    context_k_ptr,
    context_q_weight_ptr,
    context_k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    context_tokens,
    tokens,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    context_q_stride_b,
    context_q_stride_s,
    context_q_stride_h,
    context_k_stride_b,
    context_k_stride_s,
    context_k_stride_h,
    H,
    D: tl.constexpr,
    EPS: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """HEADS heads of one token's query and key; token t of a batch's context_tokens + tokens."""
    row = tl.program_id(0).to(tl.int64)
    every = context_tokens + tokens
    batch = row // every
    t = row - batch * every
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, BLOCK_D)
    inside = (head < H)[:, None] & (d < D)[None, :]
    cos = tl.load(cos_ptr + t * D + d, mask=d < D, other=0).to(tl.float32)
    sin = tl.load(sin_ptr + t * D + d, mask=d < D, other=0).to(tl.float32)
    c0, c1 = tl.split(tl.reshape(cos, (1, BLOCK_D // 2, 2)))
    s0, s1 = tl.split(tl.reshape(sin, (1, BLOCK_D // 2, 2)))
    out = row * H * D + head[:, None] * D + d[None, :]
    OUT: tl.constexpr = q_out_ptr.dtype.element_ty
    if HAS_CONTEXT and t < context_tokens:
        at = context_q_ptr + batch * context_q_stride_b + t * context_q_stride_s
        y = _normed_and_turned(at, context_q_weight_ptr, context_q_stride_h, head, d, inside, c0, c1, s0, s1, EPS, D)
        tl.store(q_out_ptr + out, y.to(OUT), mask=inside)
        at = context_k_ptr + batch * context_k_stride_b + t * context_k_stride_s
        y = _normed_and_turned(at, context_k_weight_ptr, context_k_stride_h, head, d, inside, c0, c1, s0, s1, EPS, D)
        tl.store(k_out_ptr + out, y.to(OUT), mask=inside)
    else:
        at = q_ptr + batch * q_stride_b + (t - context_tokens) * q_stride_s
        y = _normed_and_turned(at, q_weight_ptr, q_stride_h, head, d, inside, c0, c1, s0, s1, EPS, D)
        tl.store(q_out_ptr + out, y.to(OUT), mask=inside)
        at = k_ptr + batch * k_stride_b + (t - context_tokens) * k_stride_s
        y = _normed_and_turned(at, k_weight_ptr, k_stride_h, head, d, inside, c0, c1, s0, s1, EPS, D)
        tl.store(k_out_ptr + out, y.to(OUT), mask=inside)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """See `tritflow.kernels.qk_norm_rope`."""
    batch, tokens, heads, features = q.shape
    q, k = contiguous_features(q), contiguous_features(k)
    # Without context its pointers are never followed; any tensor will do.
    cq = q if context_q is None else contiguous_features(context_q)
    ck = k if context_k is None else contiguous_features(context_k)
    before = 0 if context_q is None else cq.shape[1]
    q_out = torch.empty((batch, before + tokens, heads, features), dtype=q.dtype, device=q.device)
    k_out = torch.empty(q_out.shape, dtype=q.dtype, device=q.device)
    if q_out.numel():
        qk_norm_rope_kernel[(batch * (before + tokens), triton.cdiv(heads, _HEADS))](
            q,
            k,
            q_weight.contiguous(),
            k_weight.contiguous(),
            cos.contiguous(),
            sin.contiguous(),
            cq,
            ck,
            q_weight if context_q_weight is None else context_q_weight.contiguous(),
            k_weight if context_k_weight is None else context_k_weight.contiguous(),
            q_out,
            k_out,
            before,
            tokens,
            *q.stride()[:3],
            *k.stride()[:3],
            *cq.stride()[:3],
            *ck.stride()[:3],
            heads,
            D=features,
            EPS=eps,
            HAS_CONTEXT=before > 0,
            HEADS=_HEADS,
            BLOCK_D=triton.next_power_of_2(features),
            num_warps=2,
        )
    return q_out, k_out
