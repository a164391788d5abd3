"""8-bit attention for Hopper, in Gluon: see `tritflow.kernels.attention`; plain Triton's kernel says how weights move.

One block is three partitions: a copying warp (TMA, a ring of stages) and two consumers of one warpgroup, 64 queries
each. Two orders of work, to be decided between on a GPU:

- in turn: a consumer makes a tile's weights, then waits for their product with the values and the next tile's product
  of queries and keys; meanwhile the other consumer makes weights.
- overlapping: while a consumer makes the weights of tile i, the tensor cores multiply queries with the keys of tile
  i + 1 and the weights of tile i - 1 with their values. Weights pass through shared memory then: a product in flight
  reads its registers, which the compiler would use again.

Sums of weights are taken on the ordinary cores, or as a product with ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tritflow.kernels.hopper.attention_parts import load_tiles, quantize_queries, scaled, store_rows, weigh


@gluon.constexpr_function
def _mma(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32])


@gluon.jit
def _in_turn(
    q, q_scale, k_scale, v_exponent, buffers,
    S: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, CODES: gl.constexpr, ONES: gl.constexpr,
):  # fmt: skip
    """Slot j holds the keys of tile j and the values of tile j - 1. Returns the weighted values and sums."""
    _q_bufs, k_bufs, v_bufs, _p_bufs, ones, full, empty = buffers
    D: gl.constexpr = k_bufs.shape[2]
    BN: gl.constexpr = k_bufs.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    a_layout: gl.constexpr = gl.DotOperandLayout(0, _mma(D), 4)
    rows: gl.constexpr = gl.SliceLayout(1, _mma(BN))
    m = gl.full((64,), float("-inf"), gl.float32, rows)
    sums = gl.zeros((64,), gl.float32, rows)
    no_logits = gl.zeros((64, BN), gl.int32 if q.dtype == gl.int8 else gl.float32, _mma(BN))
    no_sums = gl.zeros((64, 8), gl.float32, _mma(8))
    many = no_sums  # sums, in every column
    acc = gl.zeros((64, D), gl.float32, _mma(D))
    scale = q_scale * gl.load(k_scale)
    exponent = gl.load(v_exponent)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    stage = 1
    phase = 0
    for i in range(TILES - 1):
        next_scale = q_scale * gl.load(k_scale + (i + 1) * BN // BLOCK)
        next_exponent = gl.load(v_exponent + (i + 1) * BN // BLOCK)
        p, m, alpha, row = weigh(s, m, scale, exponent, i * BN, False, S, CODES, not ONES)
        acc = scaled(acc, alpha)
        p = gl.convert_layout(p, a_layout, assert_trivial=True)
        mbarrier.wait(full.index(stage), phase)
        acc_next = warpgroup_mma(p, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
        if ONES:
            row_next = warpgroup_mma(p, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
        s_next = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
        if ONES:
            acc, row8, s = warpgroup_mma_wait(0, deps=[acc_next, row_next, s_next])
            many = scaled(many, alpha) + row8 * gl.exp2(-exponent)
        else:
            sums = sums * alpha + row * gl.exp2(-exponent)
            acc, s = warpgroup_mma_wait(0, deps=[acc_next, s_next])
        mbarrier.arrive(empty.index(stage), count=1)
        scale = next_scale
        exponent = next_exponent
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    p, m, alpha, row = weigh(s, m, scale, exponent, (TILES - 1) * BN, S % BN != 0, S, CODES, not ONES)
    acc = scaled(acc, alpha)
    p = gl.convert_layout(p, a_layout, assert_trivial=True)
    mbarrier.wait(full.index(stage), phase)
    acc_next = warpgroup_mma(p, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
    if ONES:
        row_next = warpgroup_mma(p, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
        acc, row8 = warpgroup_mma_wait(0, deps=[acc_next, row_next])
        many = scaled(many, alpha) + row8 * gl.exp2(-exponent)
        sums = gl.convert_layout(gl.max(many, axis=1), rows)
    else:
        sums = sums * alpha + row * gl.exp2(-exponent)
        acc = warpgroup_mma_wait(0, deps=[acc_next])
    return acc, sums + scale * 0.0


@gluon.jit
def _overlapping(
    q, q_scale, k_scale, v_exponent, p_buf, buffers,
    S: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, CODES: gl.constexpr, ONES: gl.constexpr,
):  # fmt: skip
    """Slot j holds the keys of tile j and the values of tile j - 2. Returns the weighted values and sums."""
    _q_bufs, k_bufs, v_bufs, _p_bufs, ones, full, empty = buffers
    D: gl.constexpr = k_bufs.shape[2]
    BN: gl.constexpr = k_bufs.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    rows: gl.constexpr = gl.SliceLayout(1, _mma(BN))
    m = gl.full((64,), float("-inf"), gl.float32, rows)
    sums = gl.zeros((64,), gl.float32, rows)
    no_logits = gl.zeros((64, BN), gl.int32 if q.dtype == gl.int8 else gl.float32, _mma(BN))
    no_sums = gl.zeros((64, 8), gl.float32, _mma(8))
    many = no_sums  # sums, in every column
    acc = gl.zeros((64, D), gl.float32, _mma(D))
    scale = q_scale * gl.load(k_scale)
    exponent = gl.load(v_exponent)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    stage = 1
    phase = 0
    if TILES > 1:
        next_scale = q_scale * gl.load(k_scale + BN // BLOCK)
        next_exponent = gl.load(v_exponent + BN // BLOCK)
        mbarrier.wait(full.index(stage), phase)
        s_next = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
        p, m, alpha, row = weigh(s, m, scale, exponent, 0, False, S, CODES, not ONES)
        if not ONES:
            sums = row * gl.exp2(-exponent)
        acc = scaled(acc, alpha)  # zeros, or NaN
        s = warpgroup_mma_wait(0, deps=[s_next])
        mbarrier.arrive(empty.index(stage), count=1)
        p_buf.store(p)
        fence_async_shared()
        gl.thread_barrier()
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
        for i in range(1, TILES - 1):
            shrink = gl.exp2(-exponent)
            scale = next_scale
            exponent = next_exponent
            next_scale = q_scale * gl.load(k_scale + (i + 1) * BN // BLOCK)
            next_exponent = gl.load(v_exponent + (i + 1) * BN // BLOCK)
            mbarrier.wait(full.index(stage), phase)
            s_next = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), no_logits, use_acc=False, is_async=True)
            acc_next = warpgroup_mma(p_buf, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
            if ONES:
                row_next = warpgroup_mma(p_buf, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
            p, m, alpha, row = weigh(s, m, scale, exponent, i * BN, False, S, CODES, not ONES)
            if ONES:
                s, acc, row8 = warpgroup_mma_wait(0, deps=[s_next, acc_next, row_next])
                many = scaled(many + row8 * shrink, alpha)
            else:
                sums = sums * alpha + row * gl.exp2(-exponent)
                s, acc = warpgroup_mma_wait(0, deps=[s_next, acc_next])
            mbarrier.arrive(empty.index(stage), count=1)
            gl.thread_barrier()  # all warps are done with p_buf
            p_buf.store(p)
            fence_async_shared()
            acc = scaled(acc, alpha)
            gl.thread_barrier()
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
        shrink = gl.exp2(-exponent)
        scale = next_scale
        exponent = next_exponent
        mbarrier.wait(full.index(stage), phase)
        acc_next = warpgroup_mma(p_buf, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
        if ONES:
            row_next = warpgroup_mma(p_buf, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
    p, m, alpha, row = weigh(s, m, scale, exponent, (TILES - 1) * BN, S % BN != 0, S, CODES, not ONES)
    if not ONES:
        sums = sums * alpha + row * gl.exp2(-exponent)
    if TILES > 1:
        if ONES:
            acc, row8 = warpgroup_mma_wait(0, deps=[acc_next, row_next])
            many = scaled(many + row8 * shrink, alpha)
        else:
            acc = warpgroup_mma_wait(0, deps=[acc_next])
        mbarrier.arrive(empty.index(stage), count=1)
        acc = scaled(acc, alpha)
        gl.thread_barrier()  # all warps are done with p_buf
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1
    p_buf.store(p)
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.wait(full.index(stage), phase)
    acc_next = warpgroup_mma(p_buf, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
    if ONES:
        row_next = warpgroup_mma(p_buf, ones.permute((1, 0)), no_sums, use_acc=False, is_async=True)
        acc, row8 = warpgroup_mma_wait(0, deps=[acc_next, row_next])
        sums = gl.convert_layout(gl.max(many + row8 * gl.exp2(-exponent), axis=1), rows)
    else:
        acc = warpgroup_mma_wait(0, deps=[acc_next])
    return acc, sums + scale * 0.0


@gluon.jit
def _consume(
    PART: gl.constexpr, operands, buffers,
    S: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, QMAX: gl.constexpr,
    FLOOR: gl.constexpr, OVERLAP: gl.constexpr, CODES: gl.constexpr, ONES: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries."""
    q_ptr, k_scale, v_exponent, out_ptr, factor, q_strides, out_strides, H = operands
    q_bufs, k_bufs, _v_bufs, p_bufs, _ones, _full, _empty = buffers
    rows: gl.constexpr = gl.SliceLayout(1, _mma(k_bufs.shape[1]))
    bh = gl.program_id(1)
    b = (bh // H).to(gl.int64)
    h = bh % H
    first = (gl.program_id(0) * 2 + PART) * 64
    q = q_bufs.index(PART)
    q_scale = quantize_queries(q, q_ptr, q_strides, b, h, first, factor, S, QMAX, FLOOR, rows)
    k_scale += bh * (PADDED // BLOCK)
    v_exponent += bh * (PADDED // BLOCK)
    if OVERLAP:
        p_buf = p_bufs.index(PART)
        acc, sums = _overlapping(
            q, q_scale, k_scale, v_exponent, p_buf, buffers, S, STAGES, BLOCK, CODES, ONES
        )  # fmt: skip
    else:
        acc, sums = _in_turn(q, q_scale, k_scale, v_exponent, buffers, S, STAGES, BLOCK, CODES, ONES)
    store_rows(scaled(acc, 1.0 / sums), out_ptr, out_strides, b, h, first, S)


@gluon.jit
def attention_kernel(
    q_ptr,
    k_desc,
    v_desc,
    k_scale,
    v_exponent,
    out_ptr,
    factor,
    q_stride_b,
    q_stride_s,
    q_stride_h,
    out_stride_b,
    out_stride_s,
    out_stride_h,
    H,
    S: gl.constexpr,
    PADDED: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    QMAX: gl.constexpr,
    FLOOR: gl.constexpr,
    OVERLAP: gl.constexpr,
    CODES: gl.constexpr,
    ONES: gl.constexpr,
):
    """128 queries of one head; launch with 4 warps (the first consumer) on [S / 128, B H].

    k_desc [B H PADDED, D] int8 or e4m3, blocks [128, D]; v_desc e4m3 [B H D, PADDED], blocks [D, 128]; k_scale and
    v_exponent fp32 [B H, PADDED / BLOCK]; strides of [B, S, H, D] tensors; factor is log2(e) times the logits' scale.
    """
    D: gl.constexpr = k_desc.block_type.shape[1]
    BN: gl.constexpr = k_desc.block_type.shape[0]
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], k_desc.dtype)
    p_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BN], gl.float8e4nv)
    ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BN], gl.float8e4nv)
    q_bufs = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], q_layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BN], v_desc.layout)
    p_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2, 64, BN], p_layout)
    ones = gl.allocate_shared_memory(gl.float8e4nv, [8, BN], ones_layout)
    if ONES:
        flat: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [4, 1], [1, 0])
        ones.store(gl.full((8, BN), 1.0, gl.float32, flat).to(gl.float8e4nv))
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    gl.thread_barrier()
    q_strides = (q_stride_b, q_stride_s, q_stride_h)
    out_strides = (out_stride_b, out_stride_s, out_stride_h)
    operands = (q_ptr, k_scale, v_exponent, out_ptr, factor, q_strides, out_strides, H)
    buffers = (q_bufs, k_bufs, v_bufs, p_bufs, ones, full, empty)
    gl.warp_specialize(
        [
            (
                _consume,
                (gl.constexpr(0), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, OVERLAP, CODES, ONES),
            ),
            (
                _consume,
                (gl.constexpr(1), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, OVERLAP, CODES, ONES),
            ),
            (load_tiles, (k_desc, v_desc, buffers, S, PADDED, STAGES, OVERLAP)),
        ],
        [4, 1],
        [232, 24],
    )
