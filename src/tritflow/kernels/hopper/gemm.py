"""The matrix product for Hopper, in Gluon: out[m, n] = x_scale[m] * weight_scale[n] * sum_k q[m, k] T[n, k].

One block is three partitions: a warp that brings tiles in with the copy engine (TMA), and two consumers of one
warpgroup each. Both consumers read the same 128 tokens; each owns half of the weight rows. The weight is operand A of
``wgmma``: 2-bit codes go from shared memory to registers (one ldmatrix for 64 rows of 128 K), a shift and a mask
make four int8 of {0, +-64} or four e4m3 of {0, +-2.0}, and the tensor cores take them from the registers.
A consumer waits for its own products before it decodes again, because the products in flight still read
the registers that hold the weight; the *other* consumer's products fill that gap. So the tensor cores are busy
as long as the consumers stay out of step, also while one of them writes its tile (the grid is persistent).

A low-rank update (LoRA) is one more step of the ring for every 16 columns: its two factors come in as a stage's
activations and weights would, and a 16-bit product adds them to the sums, which have become floats in their registers.

What each block does is read from a table that the host makes: see ``schedule``.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tritflow.kernels.assembly import HALVES

# Four fields of a byte lie 32 apart in K, so field f of 32 bytes is the f-th K slice of 32 that wgmma takes.
_DECODE = gl.constexpr(
    """
    {
    .reg .b32 t<3>;
    shl.b32 t0, $4, 6;
    shl.b32 t1, $4, 4;
    shl.b32 t2, $4, 2;
    and.b32 $0, t0, 0xC0C0C0C0;
    and.b32 $1, t1, 0xC0C0C0C0;
    and.b32 $2, t2, 0xC0C0C0C0;
    and.b32 $3, $4, 0xC0C0C0C0;
    }
    """
)
_HALVES = gl.constexpr(HALVES)


@gluon.constexpr_function
def _packed_layout(rows, bits):
    """Registers and lanes of [rows, 32] packed bytes such that decoding moves nothing between threads."""
    if bits == 16:
        registers = [[0, 1], [0, 8], [8, 0], [0, 16]]
        lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    else:
        registers = [[0, 1], [0, 2], [8, 0], [0, 16]]
        lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    if rows == 128:
        registers = [*registers, [64, 0]]
    warps = [[16, 0], [32, 0]]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [rows, 32])


@gluon.constexpr_function
def _four(dtype):
    return (dtype, dtype, dtype, dtype)


@gluon.jit
def _decode(packed, dtype: gl.constexpr, layout: gl.constexpr, ROWS: gl.constexpr):
    """uint8 [ROWS, 32] -> [ROWS, 128] of {0, +-64} (int8) or {0, +-2.0} (e4m3, bf16, fp16), as wgmma's operand A."""
    if dtype.primitive_bitwidth == 16:
        f0, f1, f2, f3 = gl.inline_asm_elementwise(
            _HALVES,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=_four(dtype),
            is_pure=True,
            pack=4,
        )
    else:
        f0, f1, f2, f3 = gl.inline_asm_elementwise(
            _DECODE,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=_four(dtype),
            is_pure=True,
            pack=4,
        )
    fields = gl.join(gl.join(f0, f2), gl.join(f1, f3))  # [ROWS, 32, high bit of f, low bit of f]
    weight = gl.reshape(gl.permute(fields, (0, 2, 3, 1)), (ROWS, 128))
    return gl.convert_layout(weight, layout, assert_trivial=True)


@gluon.jit
def _unit(table, u):
    row = table + u * 4
    return gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return stage, phase


@gluon.jit
def _as_factor(buffer, desc):
    """A stage's memory as 16 columns of a low-rank factor, which take no more than a step of packed weights."""
    return buffer._reinterpret(desc.dtype, desc.block_type.shape, desc.layout)


@gluon.jit
def _load(
    descs,
    x_bufs,
    w_bufs,
    full,
    empty,
    table,
    starts,
    low_steps,
    low_rows,
    STAGES: gl.constexpr,
    HAS_LOW: gl.constexpr,
):
    """The copying warp: fills a ring of stages, each one K step of activations and packed weights."""
    x_desc, w_desc, low_desc, up_desc = descs
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    stage = 0
    phase = 1
    for u in range(first, last):
        # Not carried over from the unit before: Triton 3.6 takes a carried bound of the inner loop for constant.
        token, row, step, steps = _unit(table, u)
        for k in range(step, step + steps):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BM * 16 * x_desc.dtype.primitive_bitwidth + BN * 32)
            tma.async_copy_global_to_shared(w_desc, [row, k * 32], bar, w_bufs.index(stage))
            tma.async_copy_global_to_shared(x_desc, [token, k * 128], bar, x_bufs.index(stage))
            stage, phase = _next(stage, phase, STAGES)
        if HAS_LOW:
            column = row // low_rows * low_steps * 16
            for r in range(low_steps):
                mbarrier.wait(empty.index(stage), phase)
                bar = full.index(stage)
                mbarrier.expect(bar, (BM + BN) * 32)
                tma.async_copy_global_to_shared(up_desc, [row, r * 16], bar, _as_factor(w_bufs.index(stage), up_desc))
                low = _as_factor(x_bufs.index(stage), low_desc)
                tma.async_copy_global_to_shared(low_desc, [token, column + r * 16], bar, low)
                stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _scaled(acc, ts, ws, bias, bits: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Sums [rows, tokens] as floats: times both scales and what a weight of +1 reads as, plus bias."""
    unit: gl.constexpr = 0.015625 if acc.dtype == gl.int32 else 0.5
    y = acc.to(gl.float32)
    if bits == 8:
        y = y * gl.expand_dims(ts, 0)
    w = gl.expand_dims(ws.to(gl.float32) * unit, 1)
    if HAS_BIAS:
        return gl.fma(y, w, gl.expand_dims(bias.to(gl.float32), 1))
    return y * w


@gluon.jit
def _multiply(
    PART: gl.constexpr,
    operands,
    buffers,
    M,
    N,
    low_steps,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    LAG: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_LOW: gl.constexpr,
):
    """A consumer: its half of the weight rows of every unit of this block."""
    out_desc, low_desc, up_desc, x_scale, weight_scale, bias, table, starts = operands
    x_bufs, w_bufs, out_bufs, full, empty, lag = buffers
    BM: gl.constexpr = x_bufs.shape[1]
    R: gl.constexpr = w_bufs.shape[1] // 2
    H: gl.constexpr = R // SPLIT
    dtype: gl.constexpr = x_bufs.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    acc_type: gl.constexpr = gl.int32 if dtype == gl.int8 else gl.float32
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 256 // bits]
    )
    mma16: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 16])
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 32 // bits)
    packed_layout: gl.constexpr = _packed_layout(H, bits)

    first = gl.load(starts + gl.program_id(0))
    last = gl.load(starts + gl.program_id(0) + 1)
    stage = 0
    phase = 0
    count = 0
    if LAG > 0 and PART == 1:
        # Start LAG steps behind the other consumer, so that the two do not write their tiles at the same time.
        mbarrier.wait(lag.index(0), 0)
    for u in range(first, last):
        token, row, _step, steps = _unit(table, u)
        rows = row + PART * R + gl.arange(0, H, gl.SliceLayout(1, mma))
        tokens = token + gl.arange(0, BM, gl.SliceLayout(0, mma))
        # The scales are asked for before the products and used after them.
        ws0 = gl.load(weight_scale + rows, mask=rows < N, other=0.0)
        ts = ws0  # without a scale a token, or a bias, nobody reads what stands for it
        if bits == 8:
            ts = gl.load(x_scale + tokens, mask=tokens < M, other=0.0)
        bias0 = ws0
        if SPLIT == 2:
            ws1 = gl.load(weight_scale + rows + H, mask=rows + H < N, other=0.0)
            bias1 = ws1
        if HAS_BIAS:
            bias0 = gl.load(bias + rows, mask=rows < N, other=0.0)
            if SPLIT == 2:
                bias1 = gl.load(bias + rows + H, mask=rows + H < N, other=0.0)

        acc0 = gl.zeros((H, BM), acc_type, mma)
        acc1 = acc0
        for k in range(steps):
            mbarrier.wait(full.index(stage), phase)
            b = x_bufs.index(stage).permute((1, 0))
            packed0 = w_bufs.index(stage).slice(PART * R, H, dim=0).load(packed_layout)
            if SPLIT == 2:
                packed1 = w_bufs.index(stage).slice(PART * R + H, H, dim=0).load(packed_layout)
            a0 = _decode(packed0, dtype, a_layout, H)
            acc0 = warpgroup_mma(a0, b, acc0, use_acc=k > 0, is_async=True)
            if SPLIT == 2:
                a1 = _decode(packed1, dtype, a_layout, H)
                acc1 = warpgroup_mma(a1, b, acc1, use_acc=k > 0, is_async=True)
                acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
            else:
                acc0 = warpgroup_mma_wait(0, deps=[acc0])
            mbarrier.arrive(empty.index(stage), count=1)
            stage, phase = _next(stage, phase, STAGES)
            if LAG > 0 and PART == 0:
                count += 1
                if count == LAG:
                    mbarrier.arrive(lag.index(0), count=1)

        y0 = _scaled(acc0, ts, ws0, bias0, bits, HAS_BIAS)
        if HAS_LOW:
            # The same registers for the same elements, whatever the K of one instruction is.
            y0 = gl.convert_layout(y0, mma16, assert_trivial=True)
            if SPLIT == 2:
                y1 = gl.convert_layout(_scaled(acc1, ts, ws1, bias1, bits, HAS_BIAS), mma16, assert_trivial=True)
            for _ in range(low_steps):
                mbarrier.wait(full.index(stage), phase)
                b = _as_factor(x_bufs.index(stage), low_desc).permute((1, 0))
                up = _as_factor(w_bufs.index(stage), up_desc)
                y0 = warpgroup_mma(up.slice(PART * R, H, dim=0), b, y0, is_async=True)
                if SPLIT == 2:
                    y1 = warpgroup_mma(up.slice(PART * R + H, H, dim=0), b, y1, is_async=True)
                    y0, y1 = warpgroup_mma_wait(0, deps=[y0, y1])
                else:
                    y0 = warpgroup_mma_wait(0, deps=[y0])
                mbarrier.arrive(empty.index(stage), count=1)
                stage, phase = _next(stage, phase, STAGES)

        tma.store_wait(0)
        gl.thread_barrier()
        out = out_bufs.index(PART)
        if SPLIT == 2:
            out.slice(0, H, dim=1).permute((1, 0)).store(y0.to(out_desc.dtype))
            if not HAS_LOW:
                y1 = _scaled(acc1, ts, ws1, bias1, bits, HAS_BIAS)
            out.slice(H, H, dim=1).permute((1, 0)).store(y1.to(out_desc.dtype))
        else:
            out.permute((1, 0)).store(y0.to(out_desc.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [token, row + PART * R], out)
    if LAG > 0 and PART == 0:  # noqa: SIM102 - one is known to the compiler, the other is not
        if count < LAG:
            mbarrier.arrive(lag.index(0), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "low_steps", "low_rows"])
def w2a8_kernel(
    x_desc,
    w_desc,
    out_desc,
    low_desc,
    up_desc,
    x_scale,
    weight_scale,
    bias,
    table,
    starts,
    M,
    N,
    low_steps,
    low_rows,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    LAG: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_LOW: gl.constexpr,
):
    """Launch with 4 warps (the first consumer); the grid is the schedule's.

    x_desc [M, K] int8, e4m3, bf16 or fp16, blocks [BM, 128]; w_desc [N, K / 4] uint8, blocks [BN, 32]; out_desc
    [M, N] bf16 (fp16 for fp16), blocks [BM, BN / 2]; x_scale fp32 [M], unused for 16 bits; weight_scale and bias [N];
    table int32 [units, 4]; starts int32 [blocks + 1].

    With HAS_LOW, low_rows weight rows at a time share low_steps * 16 columns of low_desc [M, N / low_rows * columns],
    blocks [BM, 16], and out gets low @ up^T of them added; up_desc [N, columns], blocks [BN, 16], both in the type of
    out. No tile may lie in two such groups of rows. Without, low_desc and up_desc may be anything.
    """
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = w_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.uint8, [STAGES, BN, 32], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2, BM, BN // 2], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lag = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(lag.index(0), count=1)
    fence_async_shared()
    gl.thread_barrier()
    operands = (out_desc, low_desc, up_desc, x_scale, weight_scale, bias, table, starts)
    descs = (x_desc, w_desc, low_desc, up_desc)
    buffers = (x_bufs, w_bufs, out_bufs, full, empty, lag)
    gl.warp_specialize(
        [
            (_multiply, (gl.constexpr(0), operands, buffers, M, N, low_steps, STAGES, SPLIT, LAG, HAS_BIAS, HAS_LOW)),
            (_multiply, (gl.constexpr(1), operands, buffers, M, N, low_steps, STAGES, SPLIT, LAG, HAS_BIAS, HAS_LOW)),
            (_load, (descs, x_bufs, w_bufs, full, empty, table, starts, low_steps, low_rows, STAGES, HAS_LOW)),
        ],
        [4, 1],
        [232, 24],
    )
