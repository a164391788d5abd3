"""The simpler order, to be measured against `attention`: one product after the other, the other consumer in the gap."""

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

from tritflow.kernels.hopper.attention import _MAGIC, _row_max, _row_sum, _weigh


@gluon.jit
def _load(k_desc, v_desc, buffers, S: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp."""
    _q_bufs, k_bufs, v_bufs, _p_bufs, _ones, full, empty = buffers
    BN: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    BEHIND: gl.constexpr = 1
    bh = gl.program_id(1)
    stage = 0
    phase = 1
    for i in range(TILES + BEHIND):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        keys = i < TILES
        values = i >= BEHIND
        mbarrier.expect(bar, BN * D * 2, pred=keys & values)
        mbarrier.expect(bar, BN * D, pred=keys ^ values)
        tma.async_copy_global_to_shared(k_desc, [bh * PADDED + i * BN, 0], bar, k_bufs.index(stage), pred=keys)
        tma.async_copy_global_to_shared(v_desc, [bh * D, (i - BEHIND) * BN], bar, v_bufs.index(stage), pred=values)
        stage += 1
        if stage == STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def _attend(
    PART: gl.constexpr,
    operands,
    buffers,
    S: gl.constexpr,
    PADDED: gl.constexpr,
    STAGES: gl.constexpr,
    BLOCK: gl.constexpr,
    QMAX: gl.constexpr,
    FLOOR: gl.constexpr,
    CODES: gl.constexpr,
    ONES: gl.constexpr,
):
    """A consumer: 64 queries."""
    q_ptr, k_scale, v_exponent, out_ptr, factor, q_strides, out_strides, H = operands
    q_bufs, k_bufs, v_bufs, _p_bufs, ones, full, empty = buffers
    D: gl.constexpr = q_bufs.shape[2]
    BN: gl.constexpr = k_bufs.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    MASK: gl.constexpr = S % BN != 0
    INT8: gl.constexpr = q_bufs.dtype == gl.int8
    acc_type: gl.constexpr = gl.int32 if INT8 else gl.float32
    mma_s: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 32])
    mma_o: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 32])
    mma_l: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 32])
    s_rows: gl.constexpr = gl.SliceLayout(1, mma_s)
    o_rows: gl.constexpr = gl.SliceLayout(1, mma_o)
    l_rows: gl.constexpr = gl.SliceLayout(1, mma_l)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    wide_rows: gl.constexpr = gl.SliceLayout(1, wide)

    bh = gl.program_id(1)
    b = (bh // H).to(gl.int64)
    h = bh % H
    first = (gl.program_id(0) * q_bufs.shape[0] + PART) * 64

    # Nobody else reads these queries, so they are quantized here.
    t = first + gl.arange(0, 64, wide_rows)
    d = gl.arange(0, D, gl.SliceLayout(0, wide))
    at = q_ptr + b * q_strides[0] + h * q_strides[2] + gl.expand_dims(t.to(gl.int64) * q_strides[1], 1)
    x = gl.load(at + gl.expand_dims(d, 0), mask=gl.expand_dims(t < S, 1).broadcast_to((64, D)), other=0.0)
    x = x.to(gl.float32)
    row_scale = gl.maximum(gl.max(gl.abs(x), axis=1), FLOOR) / QMAX + gl.sum(x * 0.0, axis=1)
    x = x * gl.expand_dims(1.0 / row_scale, 1)
    if INT8:
        x = x + _MAGIC - _MAGIC
    q = q_bufs.index(PART)
    q.store(x.to(q_bufs.dtype))
    fence_async_shared()
    gl.thread_barrier()
    q_scale = gl.convert_layout(row_scale * factor, s_rows)

    k_scale += bh * (PADDED // BLOCK)
    v_exponent += bh * (PADDED // BLOCK)
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma_o, 4)
    m = gl.full((64,), float("-inf"), gl.float32, s_rows)
    sums = gl.zeros((64,), gl.float32, s_rows)
    nothing = gl.zeros((64, 8), gl.float32, mma_l)
    many = nothing  # the sums again, in every column, where the tensor cores make them
    acc = gl.zeros((64, D), gl.float32, mma_o)
    zero = gl.zeros((64, BN), acc_type, mma_s)
    scale = q_scale * gl.load(k_scale)
    exponent = gl.load(v_exponent)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    stage = 1
    phase = 0
    for i in range(TILES - 1):
        next_scale = q_scale * gl.load(k_scale + (i + 1) * BN // BLOCK)
        next_exponent = gl.load(v_exponent + (i + 1) * BN // BLOCK)
        p, m, alpha, row = _weigh(s, m, scale, exponent, i * BN, False, S, CODES, not ONES)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
        p = gl.convert_layout(p, a_layout, assert_trivial=True)
        mbarrier.wait(full.index(stage), phase)
        acc_next = warpgroup_mma(p, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
        if ONES:
            row_next = warpgroup_mma(p, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
        s_next = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        if ONES:
            acc, rows, s = warpgroup_mma_wait(0, deps=[acc_next, row_next, s_next])
            many = many * gl.expand_dims(gl.convert_layout(alpha, l_rows), 1) + rows * gl.exp2(-exponent)
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
    p, m, alpha, row = _weigh(s, m, scale, exponent, (TILES - 1) * BN, MASK, S, CODES, not ONES)
    acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
    p = gl.convert_layout(p, a_layout, assert_trivial=True)
    mbarrier.wait(full.index(stage), phase)
    acc_next = warpgroup_mma(p, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
    if ONES:
        row_next = warpgroup_mma(p, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc, rows = warpgroup_mma_wait(0, deps=[acc_next, row_next])
        many = many * gl.expand_dims(gl.convert_layout(alpha, l_rows), 1) + rows * gl.exp2(-exponent)
        sums = gl.convert_layout(gl.max(many, axis=1), s_rows) + scale * 0.0
    else:
        sums = sums * alpha + row * gl.exp2(-exponent)
        acc = warpgroup_mma_wait(0, deps=[acc_next])

    y = acc * gl.expand_dims(gl.convert_layout(1.0 / sums, o_rows), 1)
    t = first + gl.arange(0, 64, o_rows)
    d = gl.arange(0, D, gl.SliceLayout(0, mma_o))
    at = out_ptr + b * out_strides[0] + h * out_strides[2] + gl.expand_dims(t.to(gl.int64) * out_strides[1], 1)
    inside = gl.expand_dims(t < S, 1).broadcast_to((64, D))
    gl.store(at + gl.expand_dims(d, 0), y.to(out_ptr.dtype.element_ty), mask=inside)


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
    CODES: gl.constexpr,
    ONES: gl.constexpr,
):
    """128 queries of one head; launch with 4 warps (the first consumer) on [S / 128, B H].

    k_desc [B H PADDED, D] int8 or e4m3, blocks [128, D]; v_desc e4m3 [B H D, PADDED], blocks [D, 128]; k_scale and
    v_exponent fp32 [B H, PADDED / BLOCK]; strides of [B, S, H, D] tensors; factor is log2(e) times the logits' scale.
    """
    D: gl.constexpr = k_desc.block_type.shape[1]
    BN: gl.constexpr = k_desc.block_type.shape[0]
    q_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, D], k_desc.dtype)
    p_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, BN], gl.float8e4nv)
    one_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BN], gl.float8e4nv)
    q_bufs = gl.allocate_shared_memory(k_desc.dtype, [2, 64, D], q_rows)
    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [STAGES, BN, D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [STAGES, D, BN], v_desc.layout)
    p_bufs = gl.allocate_shared_memory(gl.float8e4nv, [1, 64, BN], p_rows)
    ones = gl.allocate_shared_memory(gl.float8e4nv, [8, BN], one_rows)
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
            (_attend, (gl.constexpr(0), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, CODES, ONES)),
            (_attend, (gl.constexpr(1), operands, buffers, S, PADDED, STAGES, BLOCK, QMAX, FLOOR, CODES, ONES)),
            (_load, (k_desc, v_desc, buffers, S, PADDED, STAGES)),
        ],
        [4, 1],
        [232, 24],
    )
