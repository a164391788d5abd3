"""W2A8 and W2A16 products in plain Triton. K is a constexpr: a runtime K serialises the tensor cores' pipeline."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels import tuning
from tritflow.kernels.triton.decode import decode
from tritflow.kernels.triton.low_rank import add_low_rank, constants


@triton.jit
def _tile(pid_m, pid_n, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # 64-bit rows: tokens times features may pass 2^31.
    rows_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    return rows_m, rows_n, rows_m < M, rows_n < N


@triton.jit
def _weights(weight_ptr, rows_n, in_n, block, WIDTH: tl.constexpr):
    columns = block * 32 + tl.arange(0, 32)
    return tl.load(weight_ptr + rows_n[:, None] * WIDTH + columns[None, :], mask=in_n[:, None], other=0)


@triton.jit
def w2a8_kernel(
    q_ptr,
    x_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    residual_ptr,
    gate_ptr,
    low_ptr,
    up_ptr,
    out_ptr,
    M,
    N,
    residual_stride,
    low_stride,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    FP8: tl.constexpr,
    PACKED_ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of out[m, n] = (q[m] . T[n]) * weight_scale[n] * x_scale[m] + bias[n], or residual + gate[n] * that.

    With a RANK that is not 0, see `add_low_rank`.
    """
    BLOCKS: tl.constexpr = (K + 127) // 128
    rows_m, rows_n, in_m, in_n = _tile(tl.program_id(0), tl.program_id(1), M, N, BLOCK_M, BLOCK_N)
    # The weight is the first operand, so that decoded trits can stay in registers.
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32 if FP8 else tl.int32)
    for block in range(BLOCKS):
        k = block * 128 + tl.arange(0, 128)
        codes = decode(_weights(weight_ptr, rows_n, in_n, block, BLOCKS * 32), 8, PACKED_ASM)
        if K % 128 == 0:
            q = tl.load(q_ptr + rows_m[:, None] * K + k[None, :], mask=in_m[:, None], other=0)
        else:
            q = tl.load(q_ptr + rows_m[:, None] * K + k[None, :], mask=in_m[:, None] & (k < K)[None, :], other=0)
        if FP8:
            # Read as bytes, because the interpreter cannot mask a load of this type.
            x = q.to(tl.float8e4nv, bitcast=True)
            acc = tl.dot(codes.to(tl.float8e4nv, bitcast=True), tl.trans(x), acc)
        else:
            acc = tl.dot(codes.to(tl.int8, bitcast=True), tl.trans(q), acc, out_dtype=tl.int32)
    if FP8:
        sums = acc * 0.5
    else:
        sums = (acc >> 6).to(tl.float32)
    scale_n = tl.load(weight_scale_ptr + rows_n, mask=in_n, other=0).to(tl.float32)
    scale_m = tl.load(x_scale_ptr + rows_m, mask=in_m, other=0)
    out = sums * scale_n[:, None] * scale_m[None, :]
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows_n, mask=in_n, other=0).to(tl.float32)[:, None]
    if RANK:
        first_n = tl.program_id(1) * BLOCK_N
        out = add_low_rank(
            out, low_ptr, low_stride, up_ptr, first_n, rows_m, rows_n, in_m, in_n, N, RANK, GROUPS, ALIGNED
        )
    if HAS_RESIDUAL:
        out *= tl.load(gate_ptr + rows_n, mask=in_n, other=0).to(tl.float32)[:, None]
    out = tl.trans(out)
    inside = in_m[:, None] & in_n[None, :]
    if HAS_RESIDUAL:
        at = residual_ptr + rows_m[:, None] * residual_stride + rows_n[None, :]
        out += tl.load(at, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + rows_m[:, None] * N + rows_n[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def w2a16_kernel(
    x_ptr,
    weight_ptr,
    weight_scale_ptr,
    bias_ptr,
    input_scale_ptr,
    out_ptr,
    stride_m,
    M,
    N,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    PACKED_ASM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of out[m, n] = ((x[m] * input_scale) . T[n]) * weight_scale[n] + bias[n], in x's type."""
    BLOCKS: tl.constexpr = (K + 127) // 128
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows_m, rows_n, in_m, in_n = _tile(tl.program_id(0), tl.program_id(1), M, N, BLOCK_M, BLOCK_N)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for block in range(BLOCKS):
        k = block * 128 + tl.arange(0, 128)
        codes = decode(_weights(weight_ptr, rows_n, in_n, block, BLOCKS * 32), DTYPE.primitive_bitwidth, PACKED_ASM)
        if K % 128 == 0:
            x = tl.load(x_ptr + rows_m[:, None] * stride_m + k[None, :], mask=in_m[:, None], other=0)
        else:
            in_x = in_m[:, None] & (k < K)[None, :]
            x = tl.load(x_ptr + rows_m[:, None] * stride_m + k[None, :], mask=in_x, other=0)
        if HAS_COLUMNS:
            x = (x.to(tl.float32) * tl.load(input_scale_ptr + k, mask=k < K, other=0).to(tl.float32)[None, :]).to(DTYPE)
        # ieee: TF32 would round float32 activations to 10 bits.
        acc = tl.dot(codes.to(DTYPE, bitcast=True), tl.trans(x), acc, input_precision="ieee")
    out = acc * 0.5 * tl.load(weight_scale_ptr + rows_n, mask=in_n, other=0).to(tl.float32)[:, None]
    if HAS_BIAS:
        out += tl.load(bias_ptr + rows_n, mask=in_n, other=0).to(tl.float32)[:, None]
    pointers = out_ptr + rows_m[:, None] * N + rows_n[None, :]
    tl.store(pointers, tl.trans(out).to(DTYPE), mask=in_m[:, None] & in_n[None, :])


# The interpreter runs no assembly, and AMD's is another.
PACKED_ASM = isinstance(w2a8_kernel, triton.JITFunction) and torch.version.hip is None


def launch_blocks(tokens: int, bits: int, hip: bool = torch.version.hip is not None) -> dict[str, int]:
    """Tile sizes where none were tuned; fixed choices, so that the same shape gives the same bits.

    Args:
        tokens: M.
        bits: of an activation.
        hip: for an AMD GPU, whose blocks have 64 KiB of shared memory.
    """
    wide = bits == 32
    if tokens <= 16:
        return {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    if tokens <= 64 or wide:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if wide else 3}
    return {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2 if hip else 3}


def _blocks(name: str, x: Tensor, out_features: int) -> dict[str, int]:
    choice = tuning.lookup(x.device, name, x.shape[0], out_features, x.shape[1])
    if choice is not None and choice.backend == "triton" and choice.config:
        return choice.config
    return launch_blocks(x.shape[0], 8 * x.itemsize)


def w2a8_gemm(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """(q @ T^T) * weight_scale * x_scale + bias (+ low @ up^T), or residual + gate * that.

    Args:
        q: int8 or float8_e4m3fn [M, K], contiguous.
        x_scale: float32 [M].
        weight: packed uint8 [N, 32 * ceil(K / 128)], contiguous.
        weight_scale: [N].
        bias: [N] or None.
        dtype: of the result.
        residual: [M, N], last dimension contiguous, or None.
        gate: [N], contiguous; together with `residual`.
        low: [M, S * R], last dimension contiguous, or None.
        up: [N, R], contiguous; together with `low`.
        blocks: tile sizes and launch options; by default the tuned ones.

    Returns:
        [M, N]. int8 sums are exact.
    """
    (tokens, in_features), out_features = q.shape, weight.shape[0]
    out = torch.empty((tokens, out_features), dtype=dtype, device=q.device)
    if blocks is None:
        blocks = _blocks(tuning.w2a8(q.dtype), q, out_features)
    grid = (triton.cdiv(tokens, blocks["BLOCK_M"]), triton.cdiv(out_features, blocks["BLOCK_N"]))
    if tokens and out_features:
        fp8 = q.dtype == torch.float8_e4m3fn
        w2a8_kernel[grid](
            q.view(torch.uint8) if fp8 else q,
            x_scale,
            weight,
            weight_scale,
            weight_scale if bias is None else bias,
            out if residual is None else residual,
            out if gate is None else gate,
            out if low is None else low,
            out if up is None else up,
            out,
            tokens,
            out_features,
            0 if residual is None else residual.stride(0),
            0 if low is None else low.stride(0),
            K=in_features,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            **constants(up, low, blocks["BLOCK_N"]),
            FP8=fp8,
            PACKED_ASM=PACKED_ASM,
            **blocks,
        )
    return out


def w2a16_gemm(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    blocks: dict[str, int] | None = None,
) -> Tensor:
    """((x * input_scale) @ T^T) * weight_scale + bias, float32 sums.

    Args:
        x: fp32, bf16 or fp16 [M, K], last dimension contiguous.
        weight: packed uint8 [N, 32 * ceil(K / 128)], contiguous.
        weight_scale: [N].
        bias: [N] or None.
        input_scale: [K] or None.
        blocks: tile sizes and launch options; by default the tuned ones.

    Returns:
        [M, N] in x.dtype.
    """
    (tokens, in_features), out_features = x.shape, weight.shape[0]
    out = torch.empty((tokens, out_features), dtype=x.dtype, device=x.device)
    if blocks is None:
        blocks = _blocks(tuning.W2A16, x, out_features)
    grid = (triton.cdiv(tokens, blocks["BLOCK_M"]), triton.cdiv(out_features, blocks["BLOCK_N"]))
    if tokens and out_features:
        w2a16_kernel[grid](
            x,
            weight,
            weight_scale,
            weight_scale if bias is None else bias,
            weight_scale if input_scale is None else input_scale,
            out,
            x.stride(0),
            tokens,
            out_features,
            K=in_features,
            HAS_BIAS=bias is not None,
            HAS_COLUMNS=input_scale is not None,
            PACKED_ASM=PACKED_ASM,
            **blocks,
        )
    return out
