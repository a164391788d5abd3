"""Ternary weights times few activations (M up to 8): the modulation layers, which see one row per image.

Such a product is bound by the weight's bytes, so the kernel is built around reading them in 16-byte pieces with many
pieces in flight. A warp owns 16 weight rows; a lane's 16 bytes hold 64 trits, which become bf16 {0, +-2.0} in
place and go straight to ``mma`` as operand A. A sum over K does not care for K's order, so the lane's trits keep
their order and the activations are gathered to match.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tritflow.kernels.assembly import HALVES

TOKENS = 8
ROWS = 16

_DECODE = gl.constexpr(HALVES)


@gluon.constexpr_function
def _bytes_layout(chunk):
    """[16, chunk] bytes: lane (row % 8, quarter of 64 bytes) holds 16 bytes of rows r and r + 8."""
    registers = [[0, 1], [0, 2], [0, 4], [0, 8], [8, 0]]
    piece = 64
    while piece < chunk:
        registers = [*registers, [0, piece]]
        piece *= 2
    return gl.DistributedLinearLayout(registers, [[0, 16], [0, 32], [1, 0], [2, 0], [4, 0]], [], [], [16, chunk])


@gluon.jit
def _packed(at, inside, c: gl.constexpr, layout: gl.constexpr, BYTES: gl.constexpr, CHUNK: gl.constexpr):
    mask = inside
    if c + CHUNK > BYTES:
        mask = inside & gl.expand_dims(c + gl.arange(0, CHUNK, gl.SliceLayout(0, layout)) < BYTES, 0)
    return gl.load(at + c, mask=mask, other=0)


@gluon.jit(do_not_specialize=["M", "N"])
def w2a16_skinny_kernel(
    x,
    weight,
    weight_scale,
    bias,
    out,
    M,
    N,
    K: gl.constexpr,
    BYTES: gl.constexpr,
    CHUNK: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):
    """One warp: out[0:M, row:row + 16] of x [M, K] bf16 and weight [N, BYTES]; CHUNK bytes of each row at a time."""
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[1, 1], instr_shape=[16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 4)
    layout: gl.constexpr = _bytes_layout(CHUNK)
    KC: gl.constexpr = CHUNK * 4

    row = gl.program_id(0) * 16
    rows = row + gl.arange(0, 16, gl.SliceLayout(1, layout))
    at = gl.expand_dims(rows.to(gl.int64) * BYTES, 1) + gl.expand_dims(
        gl.arange(0, CHUNK, gl.SliceLayout(0, layout)), 0
    )
    inside = gl.expand_dims(rows < N, 1)

    # Slot s of a chunk's K order: bits (b, b, c, c, f, f, i, i, piece...) of byte 64 piece + 16 c + 4 i + b, field f.
    s = gl.arange(0, KC, gl.SliceLayout(1, b_layout))
    byte = (s & 3) | (((s >> 6) & 3) << 2) | (((s >> 2) & 3) << 4) | ((s >> 8) << 6)
    k_slot = (byte // 32) * 128 + ((s >> 4) & 3) * 32 + byte % 32
    token = gl.arange(0, 8, gl.SliceLayout(0, b_layout))
    x_at = gl.expand_dims(k_slot, 1) + gl.expand_dims(token * K, 0)
    if K % 4 == 0:
        x_at = gl.max_contiguous(gl.multiple_of(x_at, (4, 1)), (4, 1))
    x_inside = gl.expand_dims(token < M, 0)

    # Two sums, since each mma waits for the one before it on the same sum.
    acc = gl.zeros((16, 8), gl.float32, mma)
    other = gl.zeros((16, 8), gl.float32, mma)
    following = _packed(weight + at, inside, 0, layout, BYTES, CHUNK)
    for c in gl.static_range(0, BYTES, CHUNK):
        packed = following
        if c + CHUNK < BYTES:
            following = _packed(weight + at, inside, c + CHUNK, layout, BYTES, CHUNK)
        x_mask = x_inside
        if c * 4 + KC > K:
            x_mask = x_inside & gl.expand_dims(c * 4 + k_slot < K, 1)
        b = gl.load(x + x_at + c * 4, mask=x_mask, other=0.0)
        f0, f1, f2, f3 = gl.inline_asm_elementwise(
            _DECODE,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=4,
        )
        fields = gl.join(gl.join(f0, f2), gl.join(f1, f3))
        # (row, piece, c, i, b, f high, f low) -> K slots (piece, i, f, c, b)
        bits = gl.reshape(fields, (16, CHUNK // 64, 4, 4, 4, 2, 2))
        a = gl.reshape(gl.permute(bits, (0, 1, 3, 5, 6, 2, 4)), (16, KC))
        a = gl.convert_layout(a, a_layout, assert_trivial=True)
        acc, other = other, mma_v2(a, b, acc)

    out_rows = row + gl.arange(0, 16, gl.SliceLayout(1, mma))
    out_tokens = gl.arange(0, 8, gl.SliceLayout(0, mma))
    scale = gl.load(weight_scale + out_rows, mask=out_rows < N, other=0.0).to(gl.float32) * 0.5
    y = (acc + other) * gl.expand_dims(scale, 1)
    if HAS_BIAS:
        y = y + gl.expand_dims(gl.load(bias + out_rows, mask=out_rows < N, other=0.0).to(gl.float32), 1)
    where = gl.expand_dims(out_tokens * N, 0) + gl.expand_dims(out_rows, 1)
    keep = gl.expand_dims(out_tokens < M, 0) & gl.expand_dims(out_rows < N, 1)
    gl.store(out + where, y.to(gl.bfloat16), mask=keep)


def w2a16_skinny(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    chunk: int = 256,
) -> torch.Tensor:
    """out[m, n] = weight_scale[n] * sum_k x[m, k] T[n, k] (+ bias[n]) for M <= 8, bf16 in and out, fp32 sums.

    ``chunk`` is how many bytes of a weight row are asked for at a time (64, 128, 256 or 512).
    """
    m, k = x.shape
    if m > TOKENS or x.dtype != torch.bfloat16:
        raise ValueError(f"the skinny kernel takes up to {TOKENS} rows of bfloat16, got {m} of {x.dtype}")
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    w2a16_skinny_kernel[(-(-n // ROWS),)](
        x.contiguous(),
        weight.contiguous(),
        weight_scale,
        weight_scale if bias is None else bias,
        out,
        m,
        n,
        K=k,
        BYTES=weight.shape[1],
        CHUNK=chunk,
        HAS_BIAS=bias is not None,
        num_warps=1,
    )
    return out
