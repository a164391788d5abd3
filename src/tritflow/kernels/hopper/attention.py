"""8-bit attention for Hopper, in Gluon: see `tritflow.kernels.attention`; plain Triton's kernel says how weights move.

One block is a copying warp (TMA, a ring of stages) and two or three consumers of one warpgroup, 64 queries each. A
consumer makes a tile's weights, then waits for their product with the values and for the next tile's product of
queries and keys; meanwhile the others make weights.
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

from tritflow.kernels.hopper.attention_parts import (
    load_tiles,
    quads,
    quantize_queries,
    read_queries,
    rescaled,
    scaled,
    store_rows,
    weigh,
    weigh_half,
)


@gluon.constexpr_function
def _mma(columns):
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 32])


@gluon.jit
def _weighted(s, state, scale, exponent, v, n, MASK: gl.constexpr, S: gl.constexpr, SKIP: gl.constexpr):
    """Makes a tile's weights of its logits and begins their product with its values v; state is (acc, m, sums)."""
    acc, m, sums = state
    mma: gl.constexpr = _mma(v.shape[0])
    if len(sums.shape) == 2:
        p, m, alpha, row = weigh_half(s, m, scale, exponent, n, MASK, S, mma)
        older = scaled(sums, alpha)
    else:
        p, m, alpha, row = weigh(s, m, scale, exponent, n, MASK, S, mma)
        older = sums * alpha
    acc = rescaled(acc, alpha) if SKIP else scaled(acc, alpha)
    acc = warpgroup_mma(p, v.permute((1, 0)), acc, is_async=True)
    return acc, m, older + row * gl.exp2(0.0 - exponent)


@gluon.jit
def _step(
    s, state, scale, exponent, q, i, stage, phase, scales, buffers,
    S: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, AHEAD: gl.constexpr, SKIP: gl.constexpr,
):  # fmt: skip
    """Tile i's weights and values, and the logits of tile i + 1."""
    q_scale, k_scale, v_exponent = scales
    _q_bufs, k_bufs, v_bufs, full, empty = buffers
    BN: gl.constexpr = k_bufs.shape[1]
    no_logits = gl.zeros((64, BN), gl.int32 if q.dtype == gl.int8 else gl.float32, _mma(BN))
    next_scale = q_scale * gl.load(k_scale + (i + 1) * BN // BLOCK)
    next_exponent = gl.load(v_exponent + (i + 1) * BN // BLOCK)
    mbarrier.wait(full.index(stage), phase)
    k = k_bufs.index(stage).permute((1, 0))
    if AHEAD:
        following = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
        acc, m, sums = _weighted(s, state, scale, exponent, v_bufs.index(stage), i * BN, False, S, SKIP)
    else:
        acc, m, sums = _weighted(s, state, scale, exponent, v_bufs.index(stage), i * BN, False, S, SKIP)
        following = warpgroup_mma(q, k, no_logits, use_acc=False, is_async=True)
    acc, following = warpgroup_mma_wait(0, deps=[acc, following])
    mbarrier.arrive(empty.index(stage), count=1)
    stage += 1
    if stage == STAGES:
        stage = 0
        phase ^= 1
    return following, (acc, m, sums), next_scale, next_exponent, stage, phase


@gluon.jit
def _attend(
    q, scales, buffers,
    S: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, AHEAD: gl.constexpr, HALF: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    """Slot j holds the keys of tile j and the values of tile j - 1. Returns the weighted values and sums."""
    q_scale, k_scale, v_exponent = scales
    _q_bufs, k_bufs, v_bufs, full, empty = buffers
    D: gl.constexpr = k_bufs.shape[2]
    BN: gl.constexpr = k_bufs.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    rows: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, _mma(D), 4))
    acc = gl.zeros((64, D), gl.float32, _mma(D))
    m = gl.full((64,), float("-inf"), gl.float32, rows)
    if HALF:
        sums = gl.zeros((64, 4), gl.float32, quads())
    else:
        sums = gl.zeros((64,), gl.float32, rows)
    state = (acc, m, sums)
    scale = q_scale * gl.load(k_scale)
    exponent = gl.load(v_exponent)
    no_logits = gl.zeros((64, BN), gl.int32 if q.dtype == gl.int8 else gl.float32, _mma(BN))
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), no_logits, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    stage = 1
    phase = 0
    # Two tiles a turn, so that logits that are made and logits that are read change places without being moved.
    for i in range(0, (TILES - 1) // 2 * 2, 2):
        s, state, scale, exponent, stage, phase = _step(
            s, state, scale, exponent, q, i, stage, phase, scales, buffers, S, STAGES, BLOCK, AHEAD, SKIP
        )
        s, state, scale, exponent, stage, phase = _step(
            s, state, scale, exponent, q, i + 1, stage, phase, scales, buffers, S, STAGES, BLOCK, AHEAD, SKIP
        )
    if TILES % 2 == 0:
        s, state, scale, exponent, stage, phase = _step(
            s, state, scale, exponent, q, TILES - 2, stage, phase, scales, buffers, S, STAGES, BLOCK, AHEAD, SKIP
        )
    mbarrier.wait(full.index(stage), phase)
    acc, m, sums = _weighted(s, state, scale, exponent, v_bufs.index(stage), (TILES - 1) * BN, S % BN != 0, S, SKIP)
    acc = warpgroup_mma_wait(0, deps=[acc])
    if HALF:
        sums = gl.convert_layout(gl.sum(sums, axis=1), rows, assert_trivial=True)
    return acc, sums + scale * 0.0


@gluon.jit
def _consume(
    PART: gl.constexpr, operands, buffers,
    S: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr, BLOCK: gl.constexpr, QMAX: gl.constexpr,
    FLOOR: gl.constexpr, CONSUMERS: gl.constexpr, AHEAD: gl.constexpr, HALF: gl.constexpr,
    SKIP: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 queries."""
    q_ptr, q_scale, k_scale, v_exponent, out_ptr, factor, q_strides, out_strides, H = operands
    q_bufs, k_bufs, _v_bufs, _full, _empty = buffers
    rows: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, _mma(k_bufs.shape[2]), 4))
    bh = gl.program_id(1)
    b = (bh // H).to(gl.int64)
    h = bh % H
    first = (gl.program_id(0) * CONSUMERS + PART) * 64
    q = q_bufs.index(PART)
    if q_ptr.dtype.element_ty == q.dtype:
        q_scale = read_queries(q, q_ptr, q_scale, bh * PADDED + first, (bh + 1) * PADDED, rows)
    else:
        q_scale = quantize_queries(q, q_ptr, q_strides, b, h, first, factor, S, QMAX, FLOOR, rows)
    k_scale += bh * (PADDED // BLOCK)
    v_exponent += bh * (PADDED // BLOCK)
    acc, sums = _attend(q, (q_scale, k_scale, v_exponent), buffers, S, STAGES, BLOCK, AHEAD, HALF, SKIP)
    store_rows(scaled(acc, 1.0 / sums), out_ptr, out_strides, b, h, first, S)


@gluon.jit
def attention_kernel(
    q_ptr,
    k_desc,
    v_desc,
    q_scale,
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
    CONSUMERS: gl.constexpr,
    AHEAD: gl.constexpr,
    HALF: gl.constexpr,
    SKIP: gl.constexpr,
):
    """64 queries a consumer, of one head; launch with 4 warps (the first consumer) on [S / (64 CONSUMERS), B H].

    q_ptr as the model has it, or what q_scale [B H, PADDED] (times factor) belongs to, 8-bit [B H PADDED, D];
    k_desc [B H PADDED, D] int8 or e4m3, blocks [128, D]; v_desc e4m3 [B H D, PADDED], blocks [D, 128]; k_scale and
    v_exponent fp32 [B H, PADDED / BLOCK]; strides of [B, S, H, D] tensors; factor is log2(e) times the logits' scale.
    """
    D: gl.constexpr = k_desc.block_type.shape[1]
    BN: gl.constexpr = k_desc.block_type.shape[0]
    q_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], k_desc.dtype)
    q_bufs = gl.allocate_shared_memory(k_desc.dtype, [CONSUMERS, 64, D], q_layout)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BN], v_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.thread_barrier()
    q_strides = (q_stride_b, q_stride_s, q_stride_h)
    out_strides = (out_stride_b, out_stride_s, out_stride_h)
    operands = (q_ptr, q_scale, k_scale, v_exponent, out_ptr, factor, q_strides, out_strides, H)
    buffers = (q_bufs, k_bufs, v_bufs, full, empty)
    # Written out twice, since a tuple that has a name holds no constants.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_consume, (
                gl.constexpr(0), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, 2, AHEAD, HALF, SKIP,
            )),
            (_consume, (
                gl.constexpr(1), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, 2, AHEAD, HALF, SKIP,
            )),
            (load_tiles, (k_desc, v_desc, buffers, S, PADDED, STAGES)),
        ], [4, 1], [232, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_consume, (
                gl.constexpr(0), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, 3, AHEAD, HALF, SKIP,
            )),
            (_consume, (
                gl.constexpr(1), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, 3, AHEAD, HALF, SKIP,
            )),
            (_consume, (
                gl.constexpr(2), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, 3, AHEAD, HALF, SKIP,
            )),
            (load_tiles, (k_desc, v_desc, buffers, S, PADDED, STAGES)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
