"""What lies between the products of a transformer block, each in one pass over its rows: see `block_ops.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE
from tritflow.kernels.triton.quantize import store_quantized


def contiguous_features(x: Tensor) -> Tensor:
    """x, copied only if its last dimension is not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(block: int, each: int = 1024) -> int:
    """Warps of a program that holds `block` features, `each` a warp."""
    return min(16, max(1, block // each))


@triton.jit
def gelu_kernel(
    x_ptr,
    prefix_ptr,
    input_scale_ptr,
    q_ptr,
    scale_ptr,
    x_stride,
    prefix_stride,
    P: tl.constexpr,
    K: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token of P features as they are and K - P after a tanh GELU, stored as they are or quantized together."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + row * x_stride + k - P, mask=inside & (k >= P), other=0).to(tl.float32)
    # x * (1 + tanh(u)) / 2 = x / (1 + 2^(-2 u / log 2)), u = sqrt(2 / pi) * (x + 0.044715 * x^3)
    y = x / (1.0 + tl.exp2(x * (-2.302208198144325 - 0.10294324 * x * x)))
    if P > 0:
        prefix = tl.load(prefix_ptr + row * prefix_stride + k, mask=k < P, other=0).to(tl.float32)
        y = tl.where(k < P, prefix, y)
    if HAS_COLUMNS:
        y *= tl.load(input_scale_ptr + k, mask=inside, other=0).to(tl.float32)
    if QUANTIZE:
        store_quantized(y, k, inside, q_ptr, scale_ptr, row, K, QMAX, FLOOR, FP8)
    else:
        tl.store(q_ptr + row * K + k, y.to(q_ptr.dtype.element_ty), mask=inside)


def _rows(x: Tensor) -> Tensor:
    return contiguous_features(x.reshape(-1, x.shape[-1]))


def _launch_gelu(
    x: Tensor, prefix: Tensor | None, input_scale: Tensor | None, dtype: str | None
) -> tuple[Tensor, Tensor]:
    rows = _rows(x)
    before = rows if prefix is None else _rows(prefix)
    width = 0 if prefix is None else before.shape[1]
    features = width + rows.shape[1]
    out = torch.empty((rows.shape[0], features), dtype=QTYPE[dtype] if dtype else x.dtype, device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device) if dtype else out
    block = triton.next_power_of_2(features)
    if rows.shape[0]:
        gelu_kernel[(rows.shape[0],)](
            rows,
            before,
            rows if input_scale is None else input_scale,
            out,
            scale,
            rows.stride(0),
            before.stride(0),
            P=width,
            K=features,
            QMAX=QMAX[dtype or "int8"],
            FLOOR=AMAX_FLOOR,
            HAS_COLUMNS=input_scale is not None,
            QUANTIZE=dtype is not None,
            FP8=dtype == "float8_e4m3fn",
            BLOCK_K=block,
            num_warps=_warps(block, 2048),
        )
    return out, scale


def gelu(x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """See `tritflow.kernels.gelu`."""
    out, _ = _launch_gelu(x, prefix, None, None)
    return out.view(*x.shape[:-1], out.shape[1])


def gelu_quantize(
    x: Tensor, prefix: Tensor | None = None, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    """See `tritflow.kernels.gelu_quantize`."""
    return _launch_gelu(x, prefix, input_scale, dtype)


@triton.jit
def gated_residual_kernel(
    residual_ptr,
    gate_ptr,
    y_ptr,
    out_ptr,
    tokens,
    residual_stride_b,
    residual_stride_s,
    gate_stride,
    y_stride_b,
    y_stride_s,
    N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One token: residual + gate * y."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    t = row - batch * tokens
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    kept = tl.load(residual_ptr + batch * residual_stride_b + t * residual_stride_s + n, mask=inside, other=0)
    gate = tl.load(gate_ptr + batch * gate_stride + n, mask=inside, other=0).to(tl.float32)
    y = tl.load(y_ptr + batch * y_stride_b + t * y_stride_s + n, mask=inside, other=0).to(tl.float32)
    out = kept.to(tl.float32) + gate * y
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=inside)


def gated_residual(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """See `tritflow.kernels.gated_residual`."""
    batch, tokens, features = residual.shape
    out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
    residual, gate, y = contiguous_features(residual), contiguous_features(gate), contiguous_features(y)
    block = min(4096, triton.next_power_of_2(features))
    if out.numel():
        gated_residual_kernel[(batch * tokens, triton.cdiv(features, block))](
            residual,
            gate,
            y,
            out,
            tokens,
            *residual.stride()[:2],
            gate.stride(0),
            *y.stride()[:2],
            N=features,
            BLOCK_N=block,
            num_warps=_warps(block),
        )
    return out


@triton.jit
def scale_sums_kernel(
    sums_ptr,
    x_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    out_ptr,
    tokens,
    residual_stride_b,
    residual_stride_s,
    gate_stride,
    N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One token of int32 sums: times both scales, plus bias, then residual + gate * that."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    out = tl.load(sums_ptr + row * N + n, mask=inside, other=0).to(tl.float32)
    out *= tl.load(weight_scale_ptr + n, mask=inside, other=0).to(tl.float32)
    out *= tl.load(x_scale_ptr + row)
    if HAS_BIAS:
        out += tl.load(bias_ptr + n, mask=inside, other=0).to(tl.float32)
    if HAS_RESIDUAL:
        batch = row // tokens
        at = batch * residual_stride_b + (row - batch * tokens) * residual_stride_s + n
        gate = tl.load(gate_ptr + batch * gate_stride + n, mask=inside, other=0).to(tl.float32)
        out = tl.load(residual_ptr + at, mask=inside, other=0).to(tl.float32) + gate * out
    tl.store(out_ptr + row * N + n, out.to(out_ptr.dtype.element_ty), mask=inside)


def scale_sums(
    sums: Tensor,
    x_scale: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """What an int32 product leaves to do, in one pass: `sums * weight_scale * x_scale + bias`, gated residual.

    Args:
        sums: int32 [M, N], contiguous.
        x_scale: float32 [M].
        weight_scale: [N].
        dtype: of the result.
        bias: [N] or None.
        residual: [B, S, N] with B * S = M, last dimension contiguous, or None.
        gate: [B, N], last dimension contiguous; together with `residual`.

    Returns:
        [M, N] in `dtype`.
    """
    rows, features = sums.shape
    out = torch.empty((rows, features), dtype=dtype, device=sums.device)
    block = min(4096, triton.next_power_of_2(features))
    if out.numel():
        scale_sums_kernel[(rows, triton.cdiv(features, block))](
            sums,
            x_scale,
            weight_scale,
            weight_scale if bias is None else bias,
            out if residual is None else residual,
            out if gate is None else gate,
            out,
            1 if residual is None else residual.shape[1],
            0 if residual is None else residual.stride(0),
            0 if residual is None else residual.stride(1),
            0 if gate is None else gate.stride(0),
            N=features,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            BLOCK_N=block,
            num_warps=_warps(block),
        )
    return out
