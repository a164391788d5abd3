"""8-bit attention in plain Triton: see `tritflow.kernels.attention`.

Two kernels: `quantize_kernel` brings queries, keys and values into 8 bits in one launch, `attention_kernel` walks over
the keys with a running maximum, as FlashAttention does.

Weights become operand A of the second product without moving between threads: a thread holds columns {2c, 2c+1} of
every eight of the first product's result and needs {4c .. 4c+3} of every sixteen, so keys are taken in another order,
and the values are stored in that order (`_shuffled`). The maximum is rounded up to a whole power of two: a weight's
rounding then does not depend on which maximum was known when it was made.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritflow.kernels.attention_reference import BLOCK, E4M3_MAX, SAMPLE, V_FLOOR
from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE
from tritflow.kernels.triton.block import contiguous_features


@triton.jit
def _to_8bit(x, INT8: tl.constexpr, TYPE: tl.constexpr):
    if INT8:
        # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even.
        x = x + 12582912.0 - 12582912.0
    return x.to(TYPE)


@triton.jit
def _shuffled(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] -> [COLUMNS, ROWS]: of every sixteen rows, 8h + 2c + i goes to place 4c + 2h + i."""
    x = tl.permute(tl.reshape(x, (ROWS // 16, 2, 4, 2, COLUMNS)), (4, 0, 2, 1, 3))
    return tl.reshape(x, (COLUMNS, ROWS))


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
    INT8: tl.constexpr,
    VALUES: tl.constexpr,
    SAMPLE: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK keys (program axis 2: 0), values (1) or queries (2) of one head; rows past S become zeros.

    q8 and k8 [B H PADDED, D], v8 e4m3 [B H D, PADDED] shuffled; q_scale float32 [B H, PADDED], times factor; k_scale
    and v_exponent float32 [B H, PADDED / BLOCK]. Without VALUES the program axis holds keys and queries.
    """
    block = tl.program_id(0)
    bh = tl.program_id(1).to(tl.int64)
    b = bh // H
    h = bh - b * H
    t = block * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    inside = (t < S)[:, None]
    at = bh * (PADDED // BLOCK) + block
    part = tl.program_id(2)
    if part == 0:
        base = k_ptr + b * k_stride_b + h * k_stride_h + d[None, :]
        few = tl.arange(0, SAMPLE) * S // SAMPLE
        mean = tl.sum(tl.load(base + few.to(tl.int64)[:, None] * k_stride_s).to(tl.float32), axis=0) / SAMPLE
        k = tl.load(base + t.to(tl.int64)[:, None] * k_stride_s, mask=inside, other=0).to(tl.float32)
        k = tl.where(inside, k - mean[None, :], 0.0)
        # Zero, or NaN if there is one: a maximum alone may drop it.
        nothing = tl.sum(tl.sum(k * 0.0, axis=1), axis=0)
        k_scale = tl.maximum(tl.max(tl.max(tl.abs(k), axis=1), axis=0), FLOOR) / QMAX + nothing
        k8 = _to_8bit(k * (1.0 / k_scale), INT8, k8_ptr.dtype.element_ty)
        tl.store(k8_ptr + (bh * PADDED + t)[:, None] * D + d[None, :], k8)
        tl.store(k_scale_ptr + at, k_scale)
    elif VALUES and part == 1:
        base = v_ptr + b * v_stride_b + h * v_stride_h + d[None, :]
        v = tl.load(base + t.to(tl.int64)[:, None] * v_stride_s, mask=inside, other=0).to(tl.float32)
        amax = tl.maximum(tl.max(tl.max(tl.abs(v), axis=1), axis=0), V_FLOOR)
        exponent = tl.ceil(tl.log2(amax / V_MAX)) + tl.sum(tl.sum(v * 0.0, axis=1), axis=0)
        v8 = _shuffled((v * tl.exp2(-exponent)).to(v8_ptr.dtype.element_ty), BLOCK, D)
        tl.store(v8_ptr + (bh * D + d)[:, None] * PADDED + t[None, :], v8)
        tl.store(v_exponent_ptr + at, exponent)
    else:
        base = q_ptr + b * q_stride_b + h * q_stride_h + d[None, :]
        q = tl.load(base + t.to(tl.int64)[:, None] * q_stride_s, mask=inside, other=0).to(tl.float32)
        q_scale = tl.maximum(tl.max(tl.abs(q), axis=1), FLOOR) / QMAX + tl.sum(q * 0.0, axis=1)
        q8 = _to_8bit(q * (1.0 / q_scale)[:, None], INT8, q8_ptr.dtype.element_ty)
        tl.store(q8_ptr + (bh * PADDED + t)[:, None] * D + d[None, :], q8)
        tl.store(q_scale_ptr + bh * PADDED + t, q_scale * factor)


@triton.jit
def _step(
    q,
    q_scale,
    acc,
    m,
    sums,
    k_desc,
    v,
    k_scale_ptr,
    v_exponent_ptr,
    v_stride_s,
    bh,
    n,
    MASK: tl.constexpr,
    V8: tl.constexpr,
    S: tl.constexpr,
    PADDED: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK_N keys from n on."""
    t = n + tl.arange(0, BLOCK_N)
    d = tl.arange(0, D)
    s = tl.dot(q, tl.trans(k_desc.load([bh * PADDED + n, 0]))).to(tl.float32)
    at = bh * (PADDED // BLOCK) + n // BLOCK
    scale = q_scale * tl.load(k_scale_ptr + at)
    exponent = tl.load(v_exponent_ptr + at) if V8 else 0.0
    if MASK:
        s = tl.where((t < S)[None, :], s, float("-inf"))
    # A maximum may drop a NaN; scale * 0 brings it back.
    new = tl.maximum(m, tl.ceil(tl.max(s, axis=1) * scale + exponent))
    alpha = tl.exp2(m - new) + scale * 0.0
    top: tl.constexpr = 8.0 if V8 else 0.0  # e4m3 reaches up to 448
    p = tl.exp2(s * scale[:, None] - (new - exponent - top)[:, None])
    sums = sums * alpha + tl.sum(p, axis=1) * tl.exp2(0.0 - exponent)
    acc = acc * alpha[:, None]
    if V8:
        p8 = tl.permute(tl.reshape(p.to(v.dtype), (BLOCK_M, BLOCK_N // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
        p8 = tl.reshape(p8, (BLOCK_M, BLOCK_N))
        acc = tl.dot(p8, tl.trans(v.load([bh * D, n])), acc)
    else:
        rows = v + t.to(tl.int64)[:, None] * v_stride_s + d[None, :]
        if MASK:
            values = tl.load(rows, mask=(t < S)[:, None], other=0.0)
        else:
            values = tl.load(rows)
        acc = tl.dot(p.to(values.dtype), values, acc)
    return acc, new, sums


@triton.jit
def attention_kernel(
    q_desc,
    k_desc,
    v,
    q_scale_ptr,
    k_scale_ptr,
    v_exponent_ptr,
    out_ptr,
    v_stride_b,
    v_stride_s,
    v_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    H,
    S: tl.constexpr,
    PADDED: tl.constexpr,
    V8: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK_M queries of one head.

    q_desc and k_desc [B H PADDED, D] int8 or e4m3, blocks [BLOCK_M, D] and [BLOCK_N, D]; v a descriptor of e4m3
    [B H D, PADDED], blocks [D, BLOCK_N] (V8), else a pointer to the values themselves. S is a constant so that products
    stay asynchronous, and queries come from memory so that Hopper's tensor cores read them from shared memory.
    """
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    first = tl.program_id(0) * BLOCK_M
    t = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, D)
    q = q_desc.load([bh * PADDED + first, 0])
    q_scale = tl.load(q_scale_ptr + bh * PADDED + t)
    if not V8:
        v += b * v_stride_b + h * v_stride_h
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sums = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, D), tl.float32)
    full: tl.constexpr = S // BLOCK_N * BLOCK_N
    for n in tl.range(0, full, BLOCK_N):
        acc, m, sums = _step(
            q, q_scale, acc, m, sums, k_desc, v, k_scale_ptr, v_exponent_ptr, v_stride_s, bh, n,
            False, V8, S, PADDED, D, BLOCK_M, BLOCK_N, BLOCK,
        )  # fmt: skip
    if full < S:
        acc, m, sums = _step(
            q, q_scale, acc, m, sums, k_desc, v, k_scale_ptr, v_exponent_ptr, v_stride_s, bh, full,
            True, V8, S, PADDED, D, BLOCK_M, BLOCK_N, BLOCK,
        )  # fmt: skip
    out = out_ptr + b * out_stride_b + h * out_stride_h + t.to(tl.int64)[:, None] * out_stride_s + d[None, :]
    tl.store(out, (acc * (1.0 / sums)[:, None]).to(out_ptr.dtype.element_ty), mask=(t < S)[:, None])


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
    padded = triton.cdiv(tokens, BLOCK) * BLOCK
    rows = batch * heads
    k8 = torch.empty((rows * padded, features), dtype=QTYPE[dtype], device=k.device)
    k_scale = torch.empty((rows, padded // BLOCK), dtype=torch.float32, device=k.device)
    q8 = None if q is None else torch.empty_like(k8)
    q_scale = None if q is None else torch.empty((rows, padded), dtype=torch.float32, device=k.device)
    v8 = torch.empty((rows * features, padded), dtype=torch.float8_e4m3fn, device=k.device) if values else None
    v_exponent = torch.empty_like(k_scale) if values else None
    # What is left out is not followed, but needs a type that exists.
    parts = 1 + (q is not None) + values
    quantize_kernel[(padded // BLOCK, rows, parts)](
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
        INT8=dtype == "int8",
        VALUES=values,
        SAMPLE=SAMPLE,
        D=features,
        BLOCK=BLOCK,
        num_warps=warps,
    )
    return Quantized(q8, k8, v8, q_scale, k_scale, v_exponent)


def logit_factor(features: int, scale: float | None) -> float:
    """What the product of a query and a key is multiplied with to be a power of two's exponent."""
    return (features**-0.5 if scale is None else scale) * math.log2(math.e)


def launch_blocks(features: int, e4m3: bool) -> dict[str, int]:
    """Tile sizes and launch options; two small blocks of 64 queries a multiprocessor beat one large."""
    if features > 128 or not e4m3:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}


def attend(quantized: Quantized, v: Tensor, blocks: dict[str, int] | None = None) -> Tensor:
    """Attention on what `quantize` gave; v [B, S, H, D] is read only where that holds no values."""
    q8, k8, v8, q_scale, k_scale, v_exponent = quantized
    if q8 is None or q_scale is None:
        raise ValueError("plain Triton's attention takes queries that are quantized already")
    batch, tokens, heads, features = v.shape
    padded = k_scale.shape[1] * BLOCK
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    options: dict[str, Any] = {**(blocks or launch_blocks(features, v8 is not None))}
    block_m, block_n = options["BLOCK_M"], options["BLOCK_N"]
    attention_kernel[(triton.cdiv(tokens, block_m), batch * heads)](
        TensorDescriptor(q8, list(q8.shape), [features, 1], [block_m, features]),
        TensorDescriptor(k8, list(k8.shape), [features, 1], [block_n, features]),
        v if v8 is None else TensorDescriptor(v8, list(v8.shape), [padded, 1], [features, block_n]),
        q_scale,
        k_scale,
        k_scale if v_exponent is None else v_exponent,
        out,
        *v.stride()[:3],
        *out.stride()[:3],
        heads,
        S=tokens,
        PADDED=padded,
        V8=v8 is not None,
        D=features,
        BLOCK=BLOCK,
        **options,
    )
    return out


def attention(
    q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None, e4m3: bool = True
) -> Tensor:
    """See `tritflow.kernels.attention`; without `e4m3`, values and weights stay in 16 bits."""
    if not q.numel():
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (contiguous_features(t) for t in (q, k, v))
    return attend(quantize(q, k, v, dtype, scale, values=e4m3), v)
