"""What bounds a product with one row: kernels of its grid that only read the weights, or do nothing."""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritflow.kernels.hopper.one_row import read_words, words_layout


@gluon.jit(do_not_specialize=["N"])
def read_kernel(
    weight,
    out,
    N,
    BYTES: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    WHOLE: gl.constexpr,
    READ: gl.constexpr,
):
    """Reads weight[row:row + ROWS] as `one_row` does and writes a number to out[block]; without READ that alone."""
    block = gl.program_id(0)
    if READ:
        words = read_words(weight, block * ROWS, N, BYTES, PARTS, ROWS, WHOLE)
        found = words[0]
        for i in gl.static_range(1, (BYTES + PARTS * 64 - 1) // (PARTS * 64) * (ROWS // 8)):
            found = found ^ words[i]
        # Of the block's words the first is written; any other only if it is one value, so that none may be left unread.
        layout: gl.constexpr = words_layout(PARTS)
        parts = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
        rows = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
        words_ = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
        first = gl.expand_dims(gl.expand_dims(parts, 1), 2) + gl.expand_dims(gl.expand_dims(rows, 0), 2)
        first = (first + gl.expand_dims(gl.expand_dims(words_, 0), 1)) == 0
        gl.store(out + block + gl.zeros_like(found), found, mask=first | (found == 0x5A3C0FF1))
    else:
        gl.store(out + block, 1)


def read_weights(
    weight: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: int = 16,
    parts: int = 4,
    read: bool = True,
) -> torch.Tensor:
    """Launch the grid of `skinny.w2a16_skinny` on packed weights [N, bytes] and read them, or (``read``) not.

    ``out``: int32, at least as many as blocks.
    """
    n = weight.shape[0]
    read_kernel[(-(-n // rows),)](
        weight,
        out,
        n,
        BYTES=weight.shape[1],
        PARTS=parts,
        ROWS=rows,
        WHOLE=n % rows == 0,
        READ=read,
        num_warps=parts,
    )
    return out
