"""Queries, keys and values into 8 bits for attention, in one launch: as they are, or normed and turned on the way.

`normed_quantize` reads what the products wrote (a text stream's rows before an image stream's), so that normed queries
and keys never go to memory in 16 bits. A program takes the keys and the queries of 128 tokens of one head, whose
rotation is the same, or their values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels.attention_reference import BLOCK, E4M3_MAX, SAMPLE, V_FLOOR
from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE
from tritflow.kernels.triton.block import contiguous_features
from tritflow.kernels.triton.quantize import magnitude, rounded, scale_of


class Quantized(NamedTuple):
    """Queries, keys and values as the kernels read them; P is the number of tokens rounded up to 128.

    Attributes:
        q8: [B H P, D], int8 or e4m3, or None.
        k8: like q8.
        v8: e4m3 [B H D, P], shuffled, or None.
        q_scale: float32 [B H, P], times the logits' scale and log2 e, or None.
        k_scale: float32 [B H, P / 128].
        v_exponent: like k_scale, log2 of the scale, or None.
    """

    q8: Tensor | None
    k8: Tensor
    v8: Tensor | None
    q_scale: Tensor | None
    k_scale: Tensor
    v_exponent: Tensor | None


@triton.jit
def _shuffled(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> [COLUMNS, ROWS]: of every sixteen rows, 8h + 2c + i goes to place 4c + 2h + i."""
    x = tl.permute(tl.reshape(x, (ROWS // 16, 2, 4, 2, COLUMNS)), (4, 0, 2, 1, 3))
    return tl.reshape(x, (COLUMNS, ROWS))


@triton.jit
def _rows(at, t, S, WHOLE: tl.constexpr):
    """float32 [T, ..] at pointers; zeros for rows t past S, unless there are none."""
    if WHOLE:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=(t < S)[:, None], other=0).to(tl.float32)


@triton.jit
def _store_keys(k, mean, t, S, k8_ptr, k_scale_ptr, rows, at, QMAX: tl.constexpr, FLOOR: tl.constexpr, FP8, D, WHOLE):
    """Keys [BLOCK, D] of one head less the mean [D], with one scale; rows past the end become zeros."""
    k -= mean[None, :]
    if not WHOLE:
        k = tl.where((t < S)[:, None], k, 0.0)
    scale = scale_of(tl.max(magnitude(k), axis=1), 0, FLOOR) / QMAX
    d = tl.arange(0, D)
    tl.store(k8_ptr + rows[:, None] * D + d[None, :], rounded(k * (1.0 / scale), FP8))
    tl.store(k_scale_ptr + at, scale)


@triton.jit
def _store_queries(q, q8_ptr, q_scale_ptr, rows, factor, QMAX: tl.constexpr, FLOOR: tl.constexpr, FP8, D):
    """Queries [BLOCK, D] of one head with a scale each, which is stored times factor."""
    scale = scale_of(magnitude(q), 1, FLOOR) / QMAX
    d = tl.arange(0, D)
    tl.store(q8_ptr + rows[:, None] * D + d[None, :], rounded(q * (1.0 / scale)[:, None], FP8))
    tl.store(q_scale_ptr + rows, scale * factor)


@triton.jit
def _store_values(v, v8_ptr, v_exponent_ptr, bh, t, at, PADDED, V_MAX, V_FLOOR, D: tl.constexpr, BLOCK: tl.constexpr):
    """Values [BLOCK, D] of one head, shuffled, with a power of two."""
    amax = scale_of(tl.max(magnitude(v), axis=1), 0, V_FLOOR)
    exponent = tl.ceil(tl.log2(amax / V_MAX))
    v8 = _shuffled((v * tl.exp2(-exponent)).to(v8_ptr.dtype.element_ty), BLOCK, D)
    tl.store(v8_ptr + (bh * D + tl.arange(0, D))[:, None] * PADDED + t[None, :], v8)
    tl.store(v_exponent_ptr + at, exponent)


@triton.jit
def quantize_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q8_ptr,
    k8_ptr,
    v8_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_exponent_ptr,
    factor,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    k_stride_b,
    k_stride_s,
    k_stride_h,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    H,
    S,
    PADDED,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    V_MAX: tl.constexpr,
    V_FLOOR: tl.constexpr,
    FP8: tl.constexpr,
    VALUES: tl.constexpr,
    SAMPLE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK keys (program axis 2: 0), values (1) or queries (2) of one head; rows past S become zeros.

    q8 and k8 [B H PADDED, D], v8 e4m3 [B H D, PADDED] shuffled; q_scale float32 [B H, PADDED], times factor; k_scale
    and v_exponent float32 [B H, PADDED / BLOCK]. Without VALUES the program axis holds keys and queries. WHOLE: S is
    PADDED.
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh - b * H
    t = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    at = bh * (PADDED // BLOCK) + block
    rows = bh * PADDED + t
    part = tl.program_id(2)
    if part == 0:
        base = k_ptr + b * k_stride_b + h * k_stride_h + d[None, :]
        few = tl.arange(0, SAMPLE) * S // SAMPLE
        mean = tl.sum(tl.load(base + few.to(tl.int64)[:, None] * k_stride_s).to(tl.float32), axis=0) / SAMPLE
        k = _rows(base + t.to(tl.int64)[:, None] * k_stride_s, t, S, WHOLE)
        _store_keys(k, mean, t, S, k8_ptr, k_scale_ptr, rows, at, QMAX, FLOOR, FP8, D, WHOLE)
    elif VALUES and part == 1:
        base = v_ptr + b * v_stride_b + h * v_stride_h + d[None, :]
        v = _rows(base + t.to(tl.int64)[:, None] * v_stride_s, t, S, WHOLE)
        _store_values(v, v8_ptr, v_exponent_ptr, bh, t, at, PADDED, V_MAX, V_FLOOR, D, BLOCK)
    else:
        base = q_ptr + b * q_stride_b + h * q_stride_h + d[None, :]
        q = _rows(base + t.to(tl.int64)[:, None] * q_stride_s, t, S, WHOLE)
        _store_queries(q, q8_ptr, q_scale_ptr, rows, factor, QMAX, FLOOR, FP8, D)


@triton.jit
def _load_rows(at, strides, context_at, context_strides, b, h, t, C, S, D: tl.constexpr, HAS_CONTEXT, WHOLE):
    """Rows t of one head, float32 [T, D], of context before the others."""
    rows = at + b * strides[0] + h * strides[2] + (t - C).to(tl.int64) * strides[1]
    if HAS_CONTEXT:
        before = context_at + b * context_strides[0] + h * context_strides[2] + t.to(tl.int64) * context_strides[1]
        rows = tl.where(t < C, before, rows)
    return _rows(rows[:, None] + tl.arange(0, D)[None, :], t, S, WHOLE)


@triton.jit
def _table(ptr, t, S, WIDTH: tl.constexpr, WHOLE):
    return _rows(ptr + t.to(tl.int64)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :], t, S, WHOLE)


@triton.jit
def _turned(x, weight_ptr, context_weight_ptr, t, cos, sin, C, EPS: tl.constexpr, D: tl.constexpr, HAS_CONTEXT):
    """RMS norm, weight and rotation of rows [T, D]; tables [T, D], or [T, D / 2] with a number a pair."""
    d = tl.arange(0, D)
    weight = tl.load(weight_ptr + d).to(tl.float32)[None, :]
    if HAS_CONTEXT:
        weight = tl.where((t < C)[:, None], tl.load(context_weight_ptr + d).to(tl.float32)[None, :], weight)
    x = x * tl.rsqrt(tl.sum(x * x, axis=1) * (1.0 / D) + EPS)[:, None] * weight
    even, odd = tl.split(tl.reshape(x, (x.shape[0], D // 2, 2)))
    if cos.shape[1] == D:
        c0, c1 = tl.split(tl.reshape(cos, (x.shape[0], D // 2, 2)))
        s0, s1 = tl.split(tl.reshape(sin, (x.shape[0], D // 2, 2)))
        turned = tl.join(even * c0 - odd * s0, odd * c1 + even * s1)
    else:
        turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    return tl.reshape(turned, (x.shape[0], D))


@triton.jit
def normed_quantize_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    context_q_ptr,
    context_k_ptr,
    context_v_ptr,
    q_weight_ptr,
    k_weight_ptr,
    context_q_weight_ptr,
    context_k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q8_ptr,
    k8_ptr,
    v8_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_exponent_ptr,
    factor,
    q_strides,
    k_strides,
    v_strides,
    context_q_strides,
    context_k_strides,
    context_v_strides,
    H,
    C,
    S,
    PADDED,
    Q_MAX: tl.constexpr,
    K_MAX: tl.constexpr,
    FLOOR: tl.constexpr,
    V_MAX: tl.constexpr,
    V_FLOOR: tl.constexpr,
    EPS: tl.constexpr,
    FP8: tl.constexpr,
    SAMPLE: tl.constexpr,
    D: tl.constexpr,
    TABLE: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_CONTEXT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """BLOCK keys and queries (program axis 2: 0) or values (1) of one head, of S tokens; see `quantize_kernel`.

    The first C are those of the context. Strides are those of batch, tokens and heads; tables float32 [S, TABLE].
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh - b * H
    t = block * BLOCK + tl.arange(0, BLOCK)
    at = bh * (PADDED // BLOCK) + block
    rows = bh * PADDED + t
    if tl.program_id(2) == 0:
        few = tl.arange(0, SAMPLE) * S // SAMPLE
        k = _load_rows(k_ptr, k_strides, context_k_ptr, context_k_strides, b, h, few, C, S, D, HAS_CONTEXT, True)
        cos, sin = _table(cos_ptr, few, S, TABLE, True), _table(sin_ptr, few, S, TABLE, True)
        k = _turned(k, k_weight_ptr, context_k_weight_ptr, few, cos, sin, C, EPS, D, HAS_CONTEXT)
        mean = tl.sum(k, axis=0) / SAMPLE
        cos, sin = _table(cos_ptr, t, S, TABLE, WHOLE), _table(sin_ptr, t, S, TABLE, WHOLE)
        k = _load_rows(k_ptr, k_strides, context_k_ptr, context_k_strides, b, h, t, C, S, D, HAS_CONTEXT, WHOLE)
        k = _turned(k, k_weight_ptr, context_k_weight_ptr, t, cos, sin, C, EPS, D, HAS_CONTEXT)
        _store_keys(k, mean, t, S, k8_ptr, k_scale_ptr, rows, at, K_MAX, FLOOR, FP8, D, WHOLE)
        q = _load_rows(q_ptr, q_strides, context_q_ptr, context_q_strides, b, h, t, C, S, D, HAS_CONTEXT, WHOLE)
        q = _turned(q, q_weight_ptr, context_q_weight_ptr, t, cos, sin, C, EPS, D, HAS_CONTEXT)
        _store_queries(q, q8_ptr, q_scale_ptr, rows, factor, Q_MAX, FLOOR, FP8, D)
    else:
        v = _load_rows(v_ptr, v_strides, context_v_ptr, context_v_strides, b, h, t, C, S, D, HAS_CONTEXT, WHOLE)
        _store_values(v, v8_ptr, v_exponent_ptr, bh, t, at, PADDED, V_MAX, V_FLOOR, D, BLOCK)


def logit_factor(features: int, scale: float | None) -> float:
    """What the product of a query and a key is multiplied with to be a power of two's exponent."""
    return (features**-0.5 if scale is None else scale) * math.log2(math.e)


def _empty(like: Tensor, tokens: int, dtype: str, queries: bool, values: bool) -> Quantized:
    """Outputs for [B, .., H, D] of `tokens` tokens."""
    batch, _, heads, features = like.shape
    padded = triton.cdiv(tokens, BLOCK) * BLOCK
    rows, device = batch * heads, like.device
    k8 = torch.empty((rows * padded, features), dtype=QTYPE[dtype], device=device)
    k_scale = torch.empty((rows, padded // BLOCK), dtype=torch.float32, device=device)
    q8 = torch.empty_like(k8) if queries else None
    q_scale = torch.empty((rows, padded), dtype=torch.float32, device=device) if queries else None
    v8 = torch.empty((rows * features, padded), dtype=torch.float8_e4m3fn, device=device) if values else None
    return Quantized(q8, k8, v8, q_scale, k_scale, torch.empty_like(k_scale) if values else None)


def quantize(
    q: Tensor | None,
    k: Tensor,
    v: Tensor,
    dtype: str,
    scale: float | None = None,
    *,
    values: bool = True,
    warps: int = 4,
) -> Quantized:
    """Queries (or none), keys and values (if `values`) [B, S, H, D] into 8 bits, in one launch.

    D is contiguous and a power of two.
    """
    batch, tokens, heads, features = k.shape
    found = _empty(k, tokens, dtype, q is not None, values)
    q8, k8, v8, q_scale, k_scale, v_exponent = found
    padded = k_scale.shape[1] * BLOCK
    # What is left out is not followed, but needs a type that exists.
    quantize_kernel[(padded // BLOCK, batch * heads, 1 + (q is not None) + values)](
        k if q is None else q,
        k,
        v,
        k8 if q8 is None else q8,
        k8,
        k8 if v8 is None else v8,
        k_scale if q_scale is None else q_scale,
        k_scale,
        k_scale if v_exponent is None else v_exponent,
        logit_factor(features, scale),
        *(k if q is None else q).stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        heads,
        tokens,
        padded,
        QMAX=QMAX[dtype],
        FLOOR=AMAX_FLOOR,
        V_MAX=E4M3_MAX,
        V_FLOOR=V_FLOOR,
        FP8=dtype != "int8",
        VALUES=values,
        SAMPLE=SAMPLE,
        D=features,
        BLOCK=BLOCK,
        WHOLE=tokens == padded,
        num_warps=warps,
    )
    return found


def normed_quantize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    dtype: str = "int8",
    scale: float | None = None,
    *,
    query_max: float | None = None,
    warps: int = 16,
) -> Quantized:
    """What `quantize` gives for normed and turned queries and keys: see `tritflow.kernels.normed_attention`.

    `query_max`: the magnitude that the largest of a query becomes; what 8 bits hold by default.
    """
    streams = [contiguous_features(t) for t in (q, k, v)]
    # Without context its pointers are never followed; any tensor will do.
    given = (context_q, context_k, context_v)
    context = [own if t is None else contiguous_features(t) for t, own in zip(given, streams, strict=True)]
    before = 0 if context_q is None else context_q.shape[1]
    batch, tokens, heads, features = q.shape
    found = _empty(q, before + tokens, dtype, True, True)
    q8, k8, v8, q_scale, k_scale, v_exponent = found
    padded = k_scale.shape[1] * BLOCK
    normed_quantize_kernel[(padded // BLOCK, batch * heads, 2)](
        *streams,
        *context,
        q_weight.contiguous(),
        k_weight.contiguous(),
        q_weight if context_q_weight is None else context_q_weight.contiguous(),
        k_weight if context_k_weight is None else context_k_weight.contiguous(),
        cos.contiguous(),
        sin.contiguous(),
        q8,
        k8,
        v8,
        q_scale,
        k_scale,
        v_exponent,
        logit_factor(features, scale),
        *(t.stride()[:3] for t in (*streams, *context)),
        heads,
        before,
        before + tokens,
        padded,
        Q_MAX=query_max or QMAX[dtype],
        K_MAX=QMAX[dtype],
        FLOOR=AMAX_FLOOR,
        V_MAX=E4M3_MAX,
        V_FLOOR=V_FLOOR,
        EPS=eps,
        FP8=dtype != "int8",
        SAMPLE=SAMPLE,
        D=features,
        TABLE=cos.shape[1],
        BLOCK=BLOCK,
        HAS_CONTEXT=before > 0,
        WHOLE=before + tokens == padded,
        num_warps=warps,
    )
    return found
