"""8-bit attention in plain Triton: see `tritflow.kernels.attention`.

`attention_inputs` brings queries, keys and values into 8 bits in one launch, `attention_kernel` walks over the keys
with a running maximum, as FlashAttention does.

Weights become operand A of the second product without moving between threads: a thread holds columns {2c, 2c+1} of
every eight of the first product's result and needs {4c .. 4c+3} of every sixteen, so keys are taken in another order,
and the values are stored in that order (`_shuffled`). The maximum is rounded up to a whole power of two: a weight's
rounding then does not depend on which maximum was known when it was made.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tritflow.kernels.attention_reference import BLOCK
from tritflow.kernels.triton.attention_inputs import Quantized, normed_quantize, quantize
from tritflow.kernels.triton.block import contiguous_features


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


def normed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """See `tritflow.kernels.normed_attention`, its arguments in its order; needs e4m3."""
    context = rest[4]
    tokens = q.shape[1] + (0 if context is None else context.shape[1])
    like = q.new_empty(()).expand(q.shape[0], tokens, *q.shape[2:])
    return attend(normed_quantize(q, k, v, *rest), like) if like.numel() else q.new_empty(like.shape)
