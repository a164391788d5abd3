"""Ternary weights times few activations (M up to 8): the modulation layers, which see one row per image.

Such a product is bound by the weight's bytes, so the kernel is built around reading them in 16-byte pieces with many
pieces in flight. A warp owns 16 weight rows; a lane's 16 bytes hold 64 trits, which become bf16 {0, +-2.0} in
place and go straight to ``mma`` as operand A. A sum over K does not care for K's order, so the lane's trits keep
their order and the activations are gathered to match.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from tritflow.kernels.assembly import HALVES

TOKENS = 8
ROW_BYTES = 1024
"""Of a row of weights: as many as `one_row` keeps in registers, so K is at most 4,096."""
_DECODE = gl.constexpr(HALVES)
_PREFETCH = gl.constexpr(
    "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
    " @first cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }"
)


@gluon.constexpr_function
def _bytes_layout(parts, rows, chunk):
    """[parts, rows, chunk] bytes, a warp a part; lane (row % 8, 16 bytes of 64) holds those of rows r, r + 8, ..."""
    registers = [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 8, 0]]
    if rows == 32:
        registers = [*registers, [0, 16, 0]]
    piece = 64
    while piece < chunk:
        registers = [*registers, [0, 0, piece]]
        piece *= 2
    lanes = [[0, 0, 16], [0, 0, 32], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _warps(parts), [], [parts, rows, chunk])


@gluon.constexpr_function
def _inputs_layout(parts, columns):
    """[parts, columns, 8] activations: lane (quarter of 64 bytes, row) holds what its weights are multiplied with."""
    registers = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 32, 0], [0, 64, 0]]
    piece = 256
    while piece < columns:
        registers = [*registers, [0, piece, 0]]
        piece *= 2
    lanes = [[0, 16, 0], [0, 128, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, _warps(parts), [], [parts, columns, 8])


@gluon.constexpr_function
def _warps(parts):
    bases: list[list[int]] = []
    part = 1
    while part < parts:
        bases = [*bases, [part, 0, 0]]
        part *= 2
    return bases


@gluon.jit
def _packed(at, columns, inside, c: gl.constexpr, BYTES: gl.constexpr, SPAN: gl.constexpr):
    """A span of packed weights, that nobody reads again."""
    mask = inside
    if c + SPAN > BYTES:
        mask = inside & (columns + c < BYTES)
    return gl.load(at + c, mask=mask, other=0, eviction_policy="evict_first")


@gluon.jit
def request_weights(weight, row, N, BYTES: gl.constexpr, ROWS: gl.constexpr, PREFETCH: gl.constexpr):
    """Let the next kernel's blocks be placed already; with PREFETCH ask for ROWS rows of weights."""
    gl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )
    if PREFETCH:
        # Into the cache that all writes go through, so nothing old is read should the kernel before write weights.
        gl.inline_asm_elementwise(
            _PREFETCH,
            "=r,l,r",
            [(weight + row.to(gl.int64) * BYTES).to(gl.uint64), gl.minimum(ROWS, N - row) * BYTES],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def wait_for_the_kernel_before():
    """Until it has ended and all that it has written can be read."""
    gl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=gl.int32, is_pure=False, pack=1)


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
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EARLY: gl.constexpr,
    PREFETCH: gl.constexpr,
):
    """out[0:M, row:row + ROWS] of x [M, K] bf16 and weight [N, BYTES]; launch with PARTS warps.

    PARTS * CHUNK bytes of each row at a time, CHUNK a warp; the warps' sums are added at the end.
    """
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[PARTS, 1, 1], instr_shape=[1, 16, 8])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, mma, 2)
    layout: gl.constexpr = _bytes_layout(PARTS, ROWS, CHUNK)
    KC: gl.constexpr = CHUNK * 4
    x_layout: gl.constexpr = _inputs_layout(PARTS, KC)
    row = gl.program_id(0) * ROWS
    if EARLY:
        request_weights(weight, row, N, BYTES, ROWS, PREFETCH)
        wait_for_the_kernel_before()
    SPAN: gl.constexpr = PARTS * CHUNK

    parts = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    bytes_ = gl.arange(0, CHUNK, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    part = gl.expand_dims(gl.expand_dims(parts, 1), 2)
    columns = part * CHUNK + gl.expand_dims(gl.expand_dims(bytes_, 0), 1)
    of_row = gl.expand_dims(gl.expand_dims(rows, 0), 2)
    at = weight + (of_row.to(gl.int64) * BYTES + columns)
    inside = of_row < N

    # Asked for before all else, though the assembler puts loads off to where they are used; a barrier behind them, that
    # it cannot pass, was slower.
    w0 = _packed(at, columns, inside, 0, BYTES, SPAN)
    w1 = w0
    if BYTES > SPAN:
        w1 = _packed(at, columns, inside, SPAN, BYTES, SPAN)
    w2 = w1
    if BYTES > 2 * SPAN:
        w2 = _packed(at, columns, inside, 2 * SPAN, BYTES, SPAN)
    total: gl.constexpr = gl.SliceLayout(0, mma)
    out_rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, total))
    scale = gl.load(weight_scale + out_rows, mask=out_rows < N, other=0.0)

    x_parts = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, x_layout)))
    slots = gl.arange(0, KC, gl.SliceLayout(0, gl.SliceLayout(2, x_layout)))
    tokens = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(1, x_layout)))
    x_column = gl.expand_dims(gl.expand_dims(x_parts, 1), 2) * KC + gl.expand_dims(gl.expand_dims(slots, 0), 2)
    token = gl.expand_dims(gl.expand_dims(tokens, 0), 1)
    there = (token < M).broadcast_to((PARTS, KC, 8))
    x_at = x + (x_column + token * K)
    if K % 8 == 0:
        x_at = gl.max_contiguous(gl.multiple_of(x_at, (1, 16, 1)), (1, 8, 1))

    # Two sums, since each mma waits for the one before it on the same sum.
    acc = gl.zeros((PARTS, ROWS, 8), gl.float32, mma)
    other = gl.zeros((PARTS, ROWS, 8), gl.float32, mma)
    for c in gl.static_range(0, BYTES, SPAN):
        packed = w0
        w0 = w1
        w1 = w2
        if c + 3 * SPAN < BYTES:
            w2 = _packed(at, columns, inside, c + 3 * SPAN, BYTES, SPAN)
        if (c + SPAN) * 4 > K:
            values = gl.load(x_at + c * 4, mask=there & (x_column + c * 4 < K), other=0.0)
        else:
            # Whatever the registers hold for rows past M: it stays in columns that are not written.
            values = gl.load(x_at + c * 4, mask=there)
        # K is (piece, c high, f, c low, i, b high, b low); both operands take (piece, i, f, b high, c, b low).
        values = gl.reshape(values, (PARTS, CHUNK // 64, 2, 4, 2, 4, 2, 2, 8))
        values = gl.reshape(gl.permute(values, (0, 1, 5, 3, 6, 2, 4, 7, 8)), (PARTS, KC, 8))
        b = gl.convert_layout(values, b_layout, assert_trivial=True)
        f0, f1, f2, f3 = gl.inline_asm_elementwise(
            _DECODE,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
            is_pure=True,
            pack=4,
        )
        fields = gl.join(gl.join(f0, f2), gl.join(f1, f3))
        # (part, row, piece, c, i, b high, b low, f high, f low)
        bits = gl.reshape(fields, (PARTS, ROWS, CHUNK // 64, 4, 4, 2, 2, 2, 2))
        a = gl.reshape(gl.permute(bits, (0, 1, 2, 4, 7, 8, 5, 3, 6)), (PARTS, ROWS, KC))
        a = gl.convert_layout(a, a_layout, assert_trivial=True)
        acc, other = other, mma_v2(a, b, acc)

    y = gl.sum(acc + other, axis=0)
    out_tokens = gl.arange(0, 8, gl.SliceLayout(0, total))
    y = y * gl.expand_dims(scale.to(gl.float32) * 0.5, 1)
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
    chunk: int = 64,
    parts: int = 4,
    rows: int | None = None,
    registers: int | None = None,
    early: bool = False,
    prefetch: bool = False,
    digits: bool = False,
) -> torch.Tensor:
    """out[m, n] = weight_scale[n] * sum_k x[m, k] T[n, k] (+ bias[n]) for M <= 8, bf16 in and out, fp32 sums.

    ``parts`` warps (1, 2, 4 or 8) share ``rows`` weight rows (16 or 32); each asks for ``chunk`` bytes of a row at a
    time (64 to 256).
    Without ``rows``, rows and registers are those that were fastest on an H200, for one token and for eight.
    ``registers`` bounds a thread's, so that more blocks fit a multiprocessor; ``early`` lets blocks be placed while the
    kernel before is still running (they wait for its end before they read anything), and with ``prefetch`` bring their
    weights into the second-level cache meanwhile. ``digits`` is the product of `one_row` (one token, K up to 4,096),
    which takes 64 bytes of a row at a time, any multiple of 16 rows and as many registers as it needs; what it does not
    take is multiplied as without ``rows``.
    """
    m, k = x.shape
    if m > TOKENS or x.dtype != torch.bfloat16:
        raise ValueError(f"the skinny kernel takes up to {TOKENS} rows of bfloat16, got {m} of {x.dtype}")
    n = weight.shape[0]
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m == 0:
        return out
    weight = weight.contiguous()
    tensors = (x.contiguous(), weight, weight_scale, weight_scale if bias is None else bias, out)
    both: dict[str, Any] = {"K": k, "BYTES": weight.shape[1], "PARTS": parts, "HAS_BIAS": bias is not None}
    both |= {"EARLY": early, "num_warps": parts, "launch_pdl": early}
    if digits and m == 1 and k % 8 == 0 and weight.shape[1] <= ROW_BYTES:
        from tritflow.kernels.hopper.one_row import one_row_kernel

        rows = 16 if rows is None else rows
        one_row_kernel[(-(-n // rows),)](*tensors, n, ROWS=rows, WHOLE=n % rows == 0, **both)
        return out
    if rows is None or digits:
        rows, registers = (16, 56) if m == 1 else (32, 96)
    w2a16_skinny_kernel[(-(-n // rows),)](
        *tensors,
        m,
        n,
        CHUNK=chunk,
        ROWS=rows,
        PREFETCH=early and prefetch and weight.data_ptr() % 16 == 0,
        maxnreg=registers,
        **both,
    )
    return out
