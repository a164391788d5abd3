"""The W2A8 matrix product for Hopper, in Gluon: out[m, n] = x_scale[m] * weight_scale[n] * sum_k q[m, k] T[n, k].

One block is three partitions: a warp that brings tiles in with the copy engine (TMA), and two consumers of one
warpgroup each. Both consumers read the same 128 tokens; each owns half of the weight rows. The weight is operand A of
``wgmma``: 2-bit codes go from shared memory to registers (one ldmatrix for 64 rows of 128 K), a shift and a mask
make four int8 of {0, +-64} or four e4m3 of {0, +-2.0}, and the tensor cores take them from the registers.
A consumer waits for its own products before it decodes again, because the products in flight still read
the registers that hold the weight; the *other* consumer's products fill that gap. So the tensor cores are busy
as long as the consumers stay out of step, also while one of them writes its tile (the grid is persistent).

What each block does is read from a table that the host makes: see ``schedule``. Tiles of the last, incomplete
wave are cut along K; the consumer that finishes a tile's last part sums all parts in their order, so the result
does not depend on who was last.
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
def _units(starts, SINGLE: gl.constexpr):
    """First and past-the-last unit of this block; with one unit a block there is nothing to look up."""
    if SINGLE:
        return gl.program_id(0), gl.program_id(0) + 1
    else:
        return gl.load(starts + gl.program_id(0)), gl.load(starts + gl.program_id(0) + 1)


@gluon.jit
def _unit(table, u):
    row = table + u * 8
    return gl.load(row), gl.load(row + 1), gl.load(row + 2), gl.load(row + 3)


@gluon.jit
def _load(
    x_desc,
    w_desc,
    x_bufs,
    w_bufs,
    full,
    empty,
    table,
    starts,
    STAGES: gl.constexpr,
    HALVES: gl.constexpr,
    SINGLE: gl.constexpr,
):
    """The copying warp: fills a ring of stages, each one K step of activations and packed weights."""
    BM: gl.constexpr = x_desc.block_type.shape[0]
    HALF: gl.constexpr = w_desc.block_type.shape[0]
    x_bytes: gl.constexpr = BM * 16 * x_desc.dtype.primitive_bitwidth
    first, last = _units(starts, SINGLE)
    stage = 0
    phase = 1
    for u in range(first, last):
        # Not carried over from the unit before: Triton 3.6 takes a carried bound of the inner loop for constant.
        token, row, step, steps = _unit(table, u)
        whole = True
        if HALVES:
            whole = gl.load(table + u * 8 + 4) > 0
        for k in range(step, step + steps):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            if whole:
                mbarrier.expect(bar, x_bytes + 2 * HALF * 32)
                tma.async_copy_global_to_shared(
                    w_desc, [row + HALF, k * 32], bar, w_bufs.index(stage).slice(HALF, HALF, dim=0)
                )
            else:
                mbarrier.expect(bar, x_bytes + HALF * 32)
            tma.async_copy_global_to_shared(w_desc, [row, k * 32], bar, w_bufs.index(stage).slice(0, HALF, dim=0))
            tma.async_copy_global_to_shared(x_desc, [token, k * 128], bar, x_bufs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _flat(acc):
    """[ROWS, BM] accumulators -> [registers / 2, 256]: thread-major rows, so that global access is coalesced."""
    ROWS: gl.constexpr = acc.shape[0]
    BM: gl.constexpr = acc.shape[1]
    split = gl.reshape(acc, (ROWS // 64, 4, 2, 8, BM // 8, 4, 2))  # (m64, warp, +8, lane row, n8, lane column, pair)
    return gl.reshape(gl.permute(split, (0, 2, 4, 1, 3, 5, 6)), (ROWS * BM // 256, 256))


@gluon.jit
def _unflat(flat, ROWS: gl.constexpr, BM: gl.constexpr, mma: gl.constexpr):
    split = gl.permute(gl.reshape(flat, (ROWS // 64, 2, BM // 8, 4, 8, 4, 2)), (0, 3, 1, 4, 2, 5, 6))
    return gl.convert_layout(gl.reshape(split, (ROWS, BM)), mma, assert_trivial=True)


@gluon.jit
def _flat_offsets(flat):
    layout: gl.constexpr = flat.type.layout
    rows = gl.arange(0, flat.shape[0], gl.SliceLayout(1, layout)) * 256
    return gl.expand_dims(rows, 1) + gl.expand_dims(gl.arange(0, 256, gl.SliceLayout(0, layout)), 0)


@gluon.jit
def _store_part(acc, at):
    flat = _flat(acc)
    gl.store(at + _flat_offsets(flat), flat)


@gluon.jit
def _sum_parts(acc, first, parts, stride, mma: gl.constexpr):
    """Sum of ``parts`` partial accumulators, in their order."""
    total = _flat(gl.zeros((acc.shape[0], acc.shape[1]), acc.dtype, mma))
    offsets = _flat_offsets(total)
    for p in range(parts):
        # Past the first-level cache: other multiprocessors wrote these.
        total += gl.load(first + p * stride + offsets, cache_modifier=".cg")
    return _unflat(total, acc.shape[0], acc.shape[1], mma)


@gluon.jit
def _products(
    steps,
    place,
    buffers,
    mma: gl.constexpr,
    PART: gl.constexpr,
    H: gl.constexpr,
    BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
    LAG: gl.constexpr,
):
    """Sums over ``steps`` K steps of a consumer's BLOCKS blocks of H weight rows (the second is zeros for one)."""
    x_bufs, w_bufs, _out_bufs, full, empty, lag, _residuals = buffers
    stage, phase, count = place
    BM: gl.constexpr = x_bufs.shape[1]
    dtype: gl.constexpr = x_bufs.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 32 // bits)
    packed_layout: gl.constexpr = _packed_layout(H, bits)
    acc0 = gl.zeros((H, BM), gl.int32 if dtype == gl.int8 else gl.float32, mma)
    acc1 = acc0
    for k in range(steps):
        mbarrier.wait(full.index(stage), phase)
        b = x_bufs.index(stage).permute((1, 0))
        packed0 = w_bufs.index(stage).slice(PART * BLOCKS * H, H, dim=0).load(packed_layout)
        if BLOCKS == 2:
            packed1 = w_bufs.index(stage).slice(PART * BLOCKS * H + H, H, dim=0).load(packed_layout)
        a0 = _decode(packed0, dtype, a_layout, H)
        acc0 = warpgroup_mma(a0, b, acc0, use_acc=k > 0, is_async=True)
        if BLOCKS == 2:
            a1 = _decode(packed1, dtype, a_layout, H)
            acc1 = warpgroup_mma(a1, b, acc1, use_acc=k > 0, is_async=True)
            acc0, acc1 = warpgroup_mma_wait(0, deps=[acc0, acc1])
        else:
            acc0 = warpgroup_mma_wait(0, deps=[acc0])
        mbarrier.arrive(empty.index(stage), count=1)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        if LAG > 0 and PART == 0:
            count += 1
            if count == LAG:
                mbarrier.arrive(lag.index(0), count=1)
    return acc0, acc1, (stage, phase, count)


@gluon.jit
def _finish(
    acc,
    out,
    ts,
    ws,
    bias,
    gate,
    bits: gl.constexpr,
    unit: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):
    """Scale sums [H, BM], add the bias, round, and lay them down as tokens x rows in shared memory.

    With HAS_RESIDUAL the residual lies there already, and becomes residual + gate * that.
    """
    y = acc.to(gl.float32)
    if bits == 8:
        y = y * gl.expand_dims(ts, 0)
    w = gl.expand_dims(ws.to(gl.float32) * unit, 1)
    if HAS_BIAS:
        y = gl.fma(y, w, gl.expand_dims(bias.to(gl.float32), 1))
    else:
        y = y * w
    place = out.permute((1, 0))
    if HAS_RESIDUAL:
        y = gl.fma(y, gl.expand_dims(gate.to(gl.float32), 1), place.load(acc.type.layout).to(gl.float32))
    place.store(y.to(out.dtype))


@gluon.jit
def _multiply(
    PART: gl.constexpr,
    operands,
    buffers,
    M,
    N,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    LAG: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CUTS: gl.constexpr,
    HALVES: gl.constexpr,
    SINGLE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):
    """A consumer: its half of the weight rows of every unit of this block."""
    out_desc, residual_desc, x_scale, weight_scale, bias, gate, workspace, counters, table, starts = operands
    x_bufs, w_bufs, out_bufs, _full, _empty, lag, residuals = buffers
    BM: gl.constexpr = x_bufs.shape[1]
    R: gl.constexpr = w_bufs.shape[1] // 2
    H: gl.constexpr = R // SPLIT
    dtype: gl.constexpr = x_bufs.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    unit: gl.constexpr = 0.015625 if dtype == gl.int8 else 0.5  # what a weight of +1 reads as is 1 / unit
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BM, 256 // bits]
    )

    first, last = _units(starts, SINGLE)
    stage = 0
    phase = 0
    count = 0
    if LAG > 0 and PART == 1:
        # Start LAG steps behind the other consumer, so that the two do not write their tiles at the same time.
        mbarrier.wait(lag.index(0), 0)
    for u in range(first, last):
        token, row, _step, steps = _unit(table, u)
        parts = gl.load(table + u * 8 + 4)
        own_row = row + PART * R
        if HALVES:
            whole = parts > 0
            own_row = row + PART * (R // 2)
            if whole:
                own_row = row + PART * R
        rows = own_row + gl.arange(0, H, gl.SliceLayout(1, mma))
        tokens = token + gl.arange(0, BM, gl.SliceLayout(0, mma))
        # The scales are asked for before the products and used after them.
        ts = 0.0
        if bits == 8:
            ts = gl.load(x_scale + tokens, mask=tokens < M, other=0.0)
        ws0 = gl.load(weight_scale + rows, mask=rows < N, other=0.0)
        bias0 = ws0
        ws1 = ws0
        if SPLIT == 2:
            ws1 = gl.load(weight_scale + rows + H, mask=rows + H < N, other=0.0)
        bias1 = ws1
        gate0 = ws0
        gate1 = ws1
        if HAS_RESIDUAL:
            gate0 = gl.load(gate + rows, mask=rows < N, other=0.0)
            if SPLIT == 2:
                gate1 = gl.load(gate + rows + H, mask=rows + H < N, other=0.0)
        if HAS_BIAS:
            bias0 = gl.load(bias + rows, mask=rows < N, other=0.0)
            if SPLIT == 2:
                bias1 = gl.load(bias + rows + H, mask=rows + H < N, other=0.0)

        out0 = out_bufs.index(PART * SPLIT)
        out1 = out_bufs.index(PART * SPLIT + SPLIT - 1)
        if HAS_RESIDUAL:
            # Where the last tile was stored from is free as soon as that store has read it.
            tma.store_wait(0)
            gl.thread_barrier()
            arrived = residuals.index(PART)
            if HALVES:
                if whole:
                    mbarrier.expect(arrived, 2 * BM * H * 2)
                    tma.async_copy_global_to_shared(residual_desc, [token, own_row + H], arrived, out1)
                else:
                    mbarrier.expect(arrived, BM * H * 2)
            else:
                mbarrier.expect(arrived, SPLIT * BM * H * 2)
                if SPLIT == 2:
                    tma.async_copy_global_to_shared(residual_desc, [token, own_row + H], arrived, out1)
            tma.async_copy_global_to_shared(residual_desc, [token, own_row], arrived, out0)

        place = (stage, phase, count)
        if HALVES:
            if whole:
                acc0, acc1, place = _products(steps, place, buffers, mma, PART, H, 2, STAGES, LAG)
            else:
                acc0, acc1, place = _products(steps, place, buffers, mma, PART, H, 1, STAGES, LAG)
        else:
            acc0, acc1, place = _products(steps, place, buffers, mma, PART, H, SPLIT, STAGES, LAG)
        stage, phase, count = place

        ready = True
        if CUTS:  # noqa: SIM102 - as below
            if parts > 1:
                # Hand in this part; whoever hands in a tile's last part sums them all and writes the tile.
                stride: gl.constexpr = 2 * R * BM
                own = workspace + gl.load(table + u * 8 + 6) * stride + PART * R * BM
                _store_part(acc0, own)
                if SPLIT == 2:
                    _store_part(acc1, own + H * BM)
                counter = counters + gl.load(table + u * 8 + 7) * 2 + PART
                gl.thread_barrier()
                ready = gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == parts - 1
                if ready:
                    part = workspace + gl.load(table + u * 8 + 5) * stride + PART * R * BM
                    acc0 = _sum_parts(acc0, part, parts, stride, mma)
                    if SPLIT == 2:
                        acc1 = _sum_parts(acc1, part + H * BM, parts, stride, mma)
                    gl.atomic_xchg(counter, 0, sem="relaxed", scope="gpu")  # ready for the next launch
        if ready:
            if HAS_RESIDUAL:
                mbarrier.wait(residuals.index(PART), (u - first) & 1)
            else:
                tma.store_wait(0)
                gl.thread_barrier()
            _finish(acc0, out0, ts, ws0, bias0, gate0, bits, unit, HAS_BIAS, HAS_RESIDUAL)
            if SPLIT == 2:
                _finish(acc1, out1, ts, ws1, bias1, gate1, bits, unit, HAS_BIAS, HAS_RESIDUAL)
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out_desc, [token, own_row], out0)
            if HALVES:
                if whole:
                    tma.async_copy_shared_to_global(out_desc, [token, own_row + H], out1)
            elif SPLIT == 2:
                tma.async_copy_shared_to_global(out_desc, [token, own_row + H], out1)
    if LAG > 0 and PART == 0:  # noqa: SIM102 - one is known to the compiler, the other is not
        if count < LAG:
            mbarrier.arrive(lag.index(0), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N"])
def w2a8_kernel(
    x_desc,
    w_desc,
    out_desc,
    residual_desc,
    x_scale,
    weight_scale,
    bias,
    gate,
    workspace,
    counters,
    table,
    starts,
    M,
    N,
    STAGES: gl.constexpr,
    SPLIT: gl.constexpr,
    LAG: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    CUTS: gl.constexpr,
    HALVES: gl.constexpr,
    SINGLE: gl.constexpr,
    HAS_RESIDUAL: gl.constexpr,
):
    """Launch with 4 warps (the first consumer); the grid is the schedule's.

    x_desc [M, K] int8, e4m3, bf16 or fp16, blocks [BM, 128]; w_desc [N, K / 4] uint8, blocks [BN / 2, 32];
    out_desc and residual_desc [M, N] bf16 (fp16 for fp16), blocks [BM, BN / 2 / SPLIT]; x_scale fp32 [M], unused for
    16 bits; weight_scale, bias and gate [N]; workspace int32 for int8, else fp32; counters int32, zeros; table int32
    [units, 8]; starts int32 [blocks + 1], unused if SINGLE: one unit a block.
    """
    BM: gl.constexpr = x_desc.block_type.shape[0]
    BN: gl.constexpr = 2 * w_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, BM, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.uint8, [STAGES, BN, 32], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [2 * SPLIT, BM, BN // 2 // SPLIT], out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lag = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    residuals = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(lag.index(0), count=1)
    mbarrier.init(residuals.index(0), count=1)
    mbarrier.init(residuals.index(1), count=1)
    fence_async_shared()
    gl.thread_barrier()
    operands = (out_desc, residual_desc, x_scale, weight_scale, bias, gate, workspace, counters, table, starts)
    buffers = (x_bufs, w_bufs, out_bufs, full, empty, lag, residuals)
    one: gl.constexpr = gl.constexpr(0)
    two: gl.constexpr = gl.constexpr(1)
    gl.warp_specialize(
        [
            (
                _multiply,
                (one, operands, buffers, M, N, STAGES, SPLIT, LAG, HAS_BIAS, CUTS, HALVES, SINGLE, HAS_RESIDUAL),
            ),
            (
                _multiply,
                (two, operands, buffers, M, N, STAGES, SPLIT, LAG, HAS_BIAS, CUTS, HALVES, SINGLE, HAS_RESIDUAL),
            ),
            (_load, (x_desc, w_desc, x_bufs, w_bufs, full, empty, table, starts, STAGES, HALVES, SINGLE)),
        ],
        [4, 1],
        [232, 24],
    )
