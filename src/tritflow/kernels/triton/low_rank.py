"""Low-rank updates in plain Triton: the first factor on quantized rows, the second onto a tile of sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels import tuning


@triton.jit
def _add_group(acc, low_ptr, low_stride, up_ptr, group, rows_m, rows_n, in_m, mine, RANK: tl.constexpr):
    CHUNK: tl.constexpr = 32 if RANK % 32 == 0 else 16
    for r in tl.static_range(0, RANK, CHUNK):
        c = r + tl.arange(0, CHUNK)
        up = tl.load(up_ptr + rows_n[:, None] * RANK + c[None, :], mask=mine[:, None], other=0)
        at = low_ptr + rows_m[:, None] * low_stride + group * RANK + c[None, :]
        low = tl.load(at, mask=in_m[:, None], other=0)
        acc = tl.dot(up, tl.trans(low), acc, input_precision="ieee")
    return acc


@triton.jit
def add_low_rank(
    acc,
    low_ptr,
    low_stride,
    up_ptr,
    first_n,
    rows_m,
    rows_n,
    in_m,
    in_n,
    N,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """float32 [BLOCK_N, BLOCK_M] + up[rows_n] . low[rows_m]^T, every group of rows with its RANK columns of low.

    ALIGNED: no tile has rows of two groups.
    """
    group_rows = N // GROUPS
    if ALIGNED:
        acc = _add_group(acc, low_ptr, low_stride, up_ptr, first_n // group_rows, rows_m, rows_n, in_m, in_n, RANK)
    else:
        for group in tl.static_range(0, GROUPS):
            mine = in_n & (rows_n // group_rows == group)
            acc = _add_group(acc, low_ptr, low_stride, up_ptr, group, rows_m, rows_n, in_m, mine, RANK)
    return acc


def constants(up: Tensor | None, low: Tensor | None, block_n: int) -> dict[str, int | bool]:
    """RANK, GROUPS and ALIGNED of `add_low_rank`; RANK is 0 without factors."""
    if up is None or low is None:
        return {"RANK": 0, "GROUPS": 1, "ALIGNED": True}
    groups = low.shape[1] // up.shape[1]
    return {"RANK": up.shape[1], "GROUPS": groups, "ALIGNED": groups == 1 or up.shape[0] // groups % block_n == 0}


@triton.jit
def low_rank_add_kernel(
    y_ptr,
    low_ptr,
    up_ptr,
    M,
    N,
    low_stride,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of y += low @ up^T."""
    first_n = tl.program_id(1) * BLOCK_N
    rows_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_n = first_n.to(tl.int64) + tl.arange(0, BLOCK_N)
    in_m, in_n = rows_m < M, rows_n < N
    at = y_ptr + rows_m[:, None] * N + rows_n[None, :]
    inside = in_m[:, None] & in_n[None, :]
    y = tl.load(at, mask=inside, other=0).to(tl.float32)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    acc = add_low_rank(acc, low_ptr, low_stride, up_ptr, first_n, rows_m, rows_n, in_m, in_n, N, RANK, GROUPS, ALIGNED)
    tl.store(at, (y + tl.trans(acc)).to(y_ptr.dtype.element_ty), mask=inside)


def low_rank_add_(y: Tensor, low: Tensor, up: Tensor) -> None:
    """See `tritflow.kernels.low_rank_add_`."""
    tokens, features = y.shape
    low = low if low.stride(1) == 1 else low.contiguous()
    if y.numel():
        low_rank_add_kernel[(triton.cdiv(tokens, 64), triton.cdiv(features, 128))](
            y,
            low,
            up.contiguous(),
            tokens,
            features,
            low.stride(0),
            BLOCK_M=64,
            BLOCK_N=128,
            **constants(up, low, 128),
            num_warps=4,
        )


@triton.jit
def low_rank_down_kernel(
    q_ptr,
    x_scale_ptr,
    down_ptr,
    out_ptr,
    M,
    COLUMNS: tl.constexpr,
    K: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One tile of out[m, c] = x_scale[m] * sum_k q[m, k] down[c, k]; bound by reading q.

    The tile is so small that one warp could hold it: each warp sums over a part of K of its own (a batch of PARTS
    products), and the parts are added in the end.
    """
    DTYPE: tl.constexpr = down_ptr.dtype.element_ty
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_m, in_c = rows < M, c < COLUMNS
    acc = tl.zeros((PARTS, BLOCK_M, BLOCK_C), dtype=tl.float32)
    STEP: tl.constexpr = PARTS * BLOCK_K
    part = tl.arange(0, PARTS)[:, None, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
    for step in range((K + STEP - 1) // STEP):
        k = step * STEP + part
        in_x, in_down = in_m[None, :, None], in_c[None, :, None]
        if K % STEP != 0:
            in_x &= k < K
            in_down &= k < K
        q = tl.load(q_ptr + rows[None, :, None] * K + k, mask=in_x, other=0)
        down = tl.load(down_ptr + c[None, :, None] * K + k, mask=in_down, other=0)
        if FP8:
            x = q.to(tl.float8e4nv, bitcast=True).to(DTYPE)
        else:
            x = q.to(DTYPE)
        acc = tl.dot(x, tl.permute(down, (0, 2, 1)), acc, input_precision="ieee")
    out = tl.sum(acc, axis=0) * tl.load(x_scale_ptr + rows, mask=in_m, other=0)[:, None]
    at = out_ptr + rows[:, None] * COLUMNS + c[None, :]
    tl.store(at, out.to(DTYPE), mask=in_m[:, None] & in_c[None, :])


def down_blocks(tokens: int, columns: int, bits: int, hip: bool = torch.version.hip is not None) -> dict[str, int]:
    """Tile sizes and launch options; fixed choices, so that the same shape gives the same bits.

    Args:
        tokens: M.
        columns: C.
        bits: of an element of the factor.
        hip: for an AMD GPU, whose blocks have 64 KiB of shared memory.
    """
    block_c = max(16, min(64, triton.next_power_of_2(columns)))
    warps = 4 if bits == 32 or hip else 8
    return {
        "BLOCK_M": 16 if tokens <= 1024 else 32,  # a few tokens would leave most of the GPU idle
        "BLOCK_C": block_c,
        "BLOCK_K": 32 if block_c == 64 or bits == 32 else 64,
        "PARTS": warps,
        "num_warps": warps,
        "num_stages": 2 if bits == 32 or hip else 3,
    }


def low_rank_down(q: Tensor, x_scale: Tensor, down: Tensor, blocks: dict[str, int] | None = None) -> Tensor:
    """See `tritflow.kernels.low_rank_down`; `blocks` replaces `down_blocks`."""
    (tokens, in_features), columns = q.shape, down.shape[0]
    out = torch.empty((tokens, columns), dtype=down.dtype, device=q.device)
    if blocks is None:
        choice = tuning.lookup(q.device, tuning.low_rank_down(q.dtype), tokens, columns, in_features)
        sixteen = down.itemsize == 2  # as it was when it was measured
        blocks = choice.config if choice is not None and sixteen else down_blocks(tokens, columns, 8 * down.itemsize)
    if out.numel():
        fp8 = q.dtype == torch.float8_e4m3fn
        q = q.contiguous()
        low_rank_down_kernel[(triton.cdiv(tokens, blocks["BLOCK_M"]), triton.cdiv(columns, blocks["BLOCK_C"]))](
            q.view(torch.uint8) if fp8 else q,
            x_scale,
            down.contiguous(),
            out,
            tokens,
            COLUMNS=columns,
            K=in_features,
            FP8=fp8,
            **blocks,
        )
    return out
