"""What lies between the products of a transformer block, each in one pass over its rows: see `block_ops.py`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE
from tritflow.kernels.triton.quantize import store_quantized

_HEADS = 8  # of one program of the rotation


def _contiguous_features(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(block: int) -> int:
    return min(16, max(1, block // 1024))


@triton.jit
def adaln_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    input_scale_ptr,
    out_ptr,
    out_scale_ptr,
    tokens,
    stride_b,
    stride_s,
    shift_stride,
    scale_stride,
    K: tl.constexpr,
    EPS: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token: (x - mean) / sqrt(var + EPS) * (1 + scale) + shift, stored as it is or quantized."""
    row = tl.program_id(0).to(tl.int64)
    batch = row // tokens
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + batch * stride_b + (row - batch * tokens) * stride_s + k, mask=inside, other=0).to(tl.float32)
    mean = tl.sum(x, axis=0) / K
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / K + EPS)
    scale = tl.load(scale_ptr + batch * scale_stride + k, mask=inside, other=0).to(tl.float32)
    shift = tl.load(shift_ptr + batch * shift_stride + k, mask=inside, other=0).to(tl.float32)
    y = centred * rstd * (1.0 + scale) + shift
    if HAS_COLUMNS:
        y *= tl.load(input_scale_ptr + k, mask=inside, other=0).to(tl.float32)
    if QUANTIZE:
        store_quantized(y, k, inside, out_ptr, out_scale_ptr, row, K, QMAX, FLOOR, FP8)
    else:
        tl.store(out_ptr + row * K + k, y.to(out_ptr.dtype.element_ty), mask=inside)


def _launch_adaln(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    dtype: str | None,
    eps: float,
) -> None:
    batch, tokens, features = x.shape
    x, shift, scale = _contiguous_features(x), _contiguous_features(shift), _contiguous_features(scale)
    block = triton.next_power_of_2(features)
    if batch * tokens:
        adaln_kernel[(batch * tokens,)](
            x,
            shift,
            scale,
            x if input_scale is None else input_scale,
            out,
            out_scale,
            tokens,
            x.stride(0),
            x.stride(1),
            shift.stride(0),
            scale.stride(0),
            K=features,
            EPS=eps,
            QMAX=QMAX[dtype or "int8"],
            FLOOR=AMAX_FLOOR,
            HAS_COLUMNS=input_scale is not None,
            QUANTIZE=dtype is not None,
            FP8=dtype == "float8_e4m3fn",
            BLOCK_K=block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """See `tritflow.kernels.adaln`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch_adaln(x, shift, scale, None, out, out, None, eps)
    return out


def adaln_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: str = "int8",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """See `tritflow.kernels.adaln_quantize`."""
    tokens = x.shape[0] * x.shape[1]
    q = torch.empty((tokens, x.shape[2]), dtype=QTYPE[dtype], device=x.device)
    out_scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    _launch_adaln(x, shift, scale, input_scale, q, out_scale, dtype, eps)
    return q, out_scale


@triton.jit
def gelu_quantize_kernel(
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
    FP8: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token of P features as they are and K - P after a tanh GELU, quantized together."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + row * x_stride + k - P, mask=inside & (k >= P), other=0).to(tl.float32)
    # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
    u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    y = x / (1.0 + tl.exp(-2.0 * u))
    if P > 0:
        prefix = tl.load(prefix_ptr + row * prefix_stride + k, mask=k < P, other=0).to(tl.float32)
        y = tl.where(k < P, prefix, y)
    if HAS_COLUMNS:
        y *= tl.load(input_scale_ptr + k, mask=inside, other=0).to(tl.float32)
    store_quantized(y, k, inside, q_ptr, scale_ptr, row, K, QMAX, FLOOR, FP8)


def _rows(x: Tensor) -> Tensor:
    return _contiguous_features(x.reshape(-1, x.shape[-1]))


def gelu_quantize(
    x: Tensor, prefix: Tensor | None = None, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    """See `tritflow.kernels.gelu_quantize`."""
    rows = _rows(x)
    before = rows if prefix is None else _rows(prefix)
    width = 0 if prefix is None else before.shape[1]
    features = width + rows.shape[1]
    q = torch.empty((rows.shape[0], features), dtype=QTYPE[dtype], device=x.device)
    scale = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(features)
    if rows.shape[0]:
        gelu_quantize_kernel[(rows.shape[0],)](
            rows,
            before,
            rows if input_scale is None else input_scale,
            q,
            scale,
            rows.stride(0),
            before.stride(0),
            P=width,
            K=features,
            QMAX=QMAX[dtype],
            FLOOR=AMAX_FLOOR,
            HAS_COLUMNS=input_scale is not None,
            FP8=dtype != "int8",
            BLOCK_K=block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )
    return q, scale


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
    q, k = _contiguous_features(q), _contiguous_features(k)
    # Without context its pointers are never followed; any tensor will do.
    cq = q if context_q is None else _contiguous_features(context_q)
    ck = k if context_k is None else _contiguous_features(context_k)
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
            num_warps=4,
        )
    return q_out, k_out


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
    residual, gate, y = _contiguous_features(residual), _contiguous_features(gate), _contiguous_features(y)
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
