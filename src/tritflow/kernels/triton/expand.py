"""Two bits a trit to a dense matrix that the vendor's libraries multiply: the first half of the scratch route."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def expand_kernel(
    weight_ptr,
    scale_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """[BLOCK_N, BYTES] packed bytes to four times as many trits: int8 (KIND 0), e4m3 bytes (1), or scaled (2)."""
    WIDTH: tl.constexpr = (K + 127) // 128 * 32
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    in_n = rows < N
    packed = tl.load(
        weight_ptr + rows[:, None] * WIDTH + columns[None, :], mask=in_n[:, None] & (columns < WIDTH)[None, :], other=0
    )
    if KIND == 2:
        scale = tl.load(scale_ptr + rows, mask=in_n, other=0).to(tl.float32)[:, None]
    for field in tl.static_range(4):
        k = columns // 32 * 128 + 32 * field + columns % 32
        code = (packed >> (2 * field)) & 3
        inside = in_n[:, None] & (k < K)[None, :]
        at = out_ptr + rows[:, None] * K + k[None, :]
        if KIND == 1:
            # +1 and -1 in e4m3 are 0x38 and 0xB8; the codes are 01 and 11.
            tl.store(at, (code & 1) * 0x38 | ((code & 2) << 6), mask=inside)
        else:
            trit = (code << 6).to(tl.int8, bitcast=True) >> 6
            if KIND == 0:
                tl.store(at, trit, mask=inside)
            else:
                tl.store(at, (trit.to(tl.float32) * scale).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def expand_words_kernel(
    weight_ptr,
    out_ptr,
    N,
    K: tl.constexpr,
    KIND: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr,
):
    """`expand_kernel` for int8 (KIND 0) and e4m3 (1), four trits at a time: the same field of four bytes is four
    neighbours in K, so a word of bytes becomes four words of values. K is a multiple of 4."""
    WIDTH: tl.constexpr = (K + 127) // 128 * 8
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * (BYTES // 4) + tl.arange(0, BYTES // 4)
    in_n = rows < N
    packed = tl.load(
        weight_ptr.to(tl.pointer_type(tl.int32)) + rows[:, None] * WIDTH + columns[None, :],
        mask=in_n[:, None] & (columns < WIDTH)[None, :],
        other=0,
    )
    for field in tl.static_range(4):
        word = columns // 8 * 32 + 8 * field + columns % 8
        code = packed >> (2 * field)
        nonzero = code & 0x01010101
        negative = (code >> 1) & 0x01010101
        if KIND == 1:
            # +1 and -1 in e4m3 are 0x38 and 0xB8.
            value = nonzero * 0x38 | (negative << 7)
        else:
            value = nonzero | negative * 0xFE
        inside = in_n[:, None] & (word < K // 4)[None, :]
        tl.store(out_ptr + rows[:, None] * (K // 4) + word[None, :], value, mask=inside)


def expand(weight: Tensor, in_features: int, dtype: torch.dtype, weight_scale: Tensor | None = None) -> Tensor:
    """Trits as a dense matrix.

    Args:
        weight: packed uint8 [N, 32 * ceil(K / 128)], contiguous.
        in_features: K.
        dtype: int8 or float8_e4m3fn for the trits alone; bf16, fp16 or fp32 for `weight_scale[n] * T[n, k]`.
        weight_scale: [N]; only for the latter.

    Returns:
        [N, K] in `dtype`.
    """
    rows = weight.shape[0]
    out = torch.empty((rows, in_features), dtype=dtype, device=weight.device)
    kind = {torch.int8: 0, torch.float8_e4m3fn: 1}.get(dtype, 2)
    if not out.numel():
        return out
    if kind < 2 and in_features % 4 == 0:
        expand_words_kernel[(triton.cdiv(rows, 8), triton.cdiv(weight.shape[1], 128))](
            weight, out.view(torch.int32), rows, K=in_features, KIND=kind, BLOCK_N=8, BYTES=128, num_warps=4
        )
    else:
        expand_kernel[(triton.cdiv(rows, 8), triton.cdiv(weight.shape[1], 256))](
            weight,
            weight if weight_scale is None else weight_scale,
            out.view(torch.uint8) if kind == 1 else out,
            rows,
            K=in_features,
            KIND=kind,
            BLOCK_N=8,
            BYTES=256,
            num_warps=4,
        )
    return out
