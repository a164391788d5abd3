"""Per-token 8-bit quantization in one pass, bit for bit the reference's integers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE

MAX_FEATURES = 1 << 16
"""A row has to fit the registers of one program."""


@triton.jit
def scale_of(magnitudes, axis: tl.constexpr, FLOOR: tl.constexpr):
    """Largest of |x|, given as `magnitude` gives it; a NaN is the largest of all, or a row would look sound."""
    amax = tl.max(magnitudes, axis=axis).to(tl.float32, bitcast=True)
    return tl.where(amax < FLOOR, FLOOR, amax)


@triton.jit
def magnitude(x):
    """|x| of float32 as integers, which keep its order."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def rounded(scaled, FP8: tl.constexpr):
    """As e4m3, or as int8."""
    if FP8:
        q = scaled.to(tl.float8e4nv)
    else:
        # Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
        q = (scaled + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return q


@triton.jit
def store_quantized(
    x,
    k,
    inside,
    q_ptr,
    scale_ptr,
    row,
    K: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    FP8: tl.constexpr,
):
    """Write one row x[k] (float32, zeros where not inside): scale = max|x| / QMAX, q = round(x * (QMAX / max|x|))."""
    amax = scale_of(magnitude(x), 0, FLOOR)
    scaled = x * tl.div_rn(tl.full((), QMAX, tl.float32), amax)
    tl.store(q_ptr + row * K + k, rounded(scaled, FP8), mask=inside)
    tl.store(scale_ptr + row, tl.div_rn(amax, tl.full((), QMAX, tl.float32)))


@triton.jit
def quantize_kernel(
    x_ptr,
    input_scale_ptr,
    q_ptr,
    scale_ptr,
    stride_m,
    K: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One row: scale = max|x c| / QMAX, q = round(x c * (QMAX / max|x c|))."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + row * stride_m + k, mask=inside, other=0).to(tl.float32)
    if HAS_COLUMNS:
        x *= tl.load(input_scale_ptr + k, mask=inside, other=0).to(tl.float32)
    store_quantized(x, k, inside, q_ptr, scale_ptr, row, K, QMAX, FLOOR, FP8)


def quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """See `tritflow.kernels.quantize_activation`."""
    in_features = x.shape[-1]
    rows = x.reshape(-1, in_features)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    q = torch.empty(rows.shape, dtype=QTYPE[dtype], device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(in_features)
    if rows.shape[0]:
        quantize_kernel[(rows.shape[0],)](
            rows,
            rows if input_scale is None else input_scale,
            q,
            scale,
            rows.stride(0),
            K=in_features,
            QMAX=QMAX[dtype],
            FLOOR=AMAX_FLOOR,
            HAS_COLUMNS=input_scale is not None,
            FP8=dtype != "int8",
            BLOCK_K=block,
            num_warps=min(16, max(1, block // 1024)),
            enable_fp_fusion=False,  # a fused multiply-add would round once where the reference rounds twice
        )
    return q, scale
