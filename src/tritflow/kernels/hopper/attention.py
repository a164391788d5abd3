"""8-bit attention for Hopper, in Gluon: see `tritflow.kernels.attention`; plain Triton's kernel says how weights move.

One block is three partitions: a copying warp (TMA, a ring of stages) and two consumers of one warpgroup, 64 queries
each. A consumer works on three tiles of keys at once: while it makes the weights of tile i on the ordinary cores, the
tensor cores multiply queries with the keys of tile i + 1 and the weights of tile i - 1 with their values. Weights pass
through shared memory, since a product in flight reads its registers, which the compiler would use again.

Slot j of the ring holds the keys of tile j and the values of tile j - 2, which are read together.
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

_MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2^23: a float this large holds a whole number in its low bits


@gluon.jit
def _load(k_desc, v_desc, buffers, S: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp."""
    _q_bufs, k_bufs, v_bufs, _p_bufs, _ones, full, empty = buffers
    BN: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    BEHIND: gl.constexpr = 2 if TILES > 1 else 1
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
def _row_max(x):
    """Maximum of rows in two steps: many short chains of operations instead of few long ones."""
    rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    x = gl.max(gl.reshape(x, (x.shape[0], 4, x.shape[1] // 4)), axis=1)
    return gl.convert_layout(gl.max(x, axis=1), rows)


@gluon.jit
def _row_sum(x):
    rows: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    x = gl.sum(gl.reshape(x, (x.shape[0], 4, x.shape[1] // 4)), axis=1)
    return gl.convert_layout(gl.sum(x, axis=1), rows)


@gluon.jit
def _weigh(s, m, scale, exponent, n, MASK: gl.constexpr, S: gl.constexpr, CODES: gl.constexpr, SUM: gl.constexpr):
    """Weights of one tile (e4m3, keys in the order of the values), new maximum, factor for older sums, row sums."""
    rows: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[1]
    s = s.to(gl.float32)
    if MASK:
        t = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(t < S, 0), s, float("-inf"))
    # A maximum may drop a NaN; scale * 0 brings it back.
    new = gl.maximum(m, gl.ceil(gl.fma(_row_max(s), scale, exponent)))
    alpha = gl.exp2(m - new) + scale * 0.0
    top = exponent - new
    sums = alpha
    if CODES == 0:
        slope = gl.expand_dims(scale, 1).broadcast_to(s.shape)
        p = gl.exp2(gl.fma(s, slope, gl.expand_dims(top + 8.0, 1).broadcast_to(s.shape)))
        if SUM:
            sums = _row_sum(p)
        p8 = p.to(gl.float8e4nv)
    else:
        # 2^y in e4m3's own bits: 8 y + 120 rounded is the code of about 2^(8 + y), at most 6 % off; all constants
        # but the slope are whole numbers, so that nothing but s is rounded.
        if CODES == 1:
            slope = gl.expand_dims(scale * 8.0, 1).broadcast_to(s.shape)
            code = gl.fma(s, slope, gl.expand_dims(top * 8.0 + (120.0 + _MAGIC), 1).broadcast_to(s.shape))
            code = gl.maximum(code, _MAGIC)
        else:
            slope = gl.expand_dims(scale * 0.0625, 1).broadcast_to(s.shape)
            offset = gl.expand_dims(top * 0.0625 + 0.9375, 1).broadcast_to(s.shape)
            code = gl.inline_asm_elementwise(
                "fma.rn.sat.f32 $0, $1, $2, $3;",
                "=f,f,f,f",
                [s, slope, offset],
                dtype=gl.float32,
                is_pure=True,
                pack=1,
            )
            code = gl.fma(code, gl.full_like(code, 128.0), gl.full_like(code, _MAGIC))
        code = code.to(gl.int32, bitcast=True)
        if SUM:
            sums = _row_sum((code << 20).to(gl.float32, bitcast=True)) * 1.329227995784916e36  # 2^120
        p8 = code.to(gl.uint8).to(gl.float8e4nv, bitcast=True)
    p8 = gl.permute(gl.reshape(p8, (rows, BN // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return gl.reshape(p8, (rows, BN)), new, alpha, sums


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
    q_bufs, k_bufs, v_bufs, p_bufs, ones, full, empty = buffers
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
    m = gl.full((64,), float("-inf"), gl.float32, s_rows)
    sums = gl.zeros((64,), gl.float32, s_rows)
    nothing = gl.zeros((64, 8), gl.float32, mma_l)
    many = nothing  # the sums again, in every column, where the tensor cores make them
    acc = gl.zeros((64, D), gl.float32, mma_o)
    zero = gl.zeros((64, BN), acc_type, mma_s)
    p_buf = p_bufs.index(PART)
    scale = q_scale * gl.load(k_scale)
    exponent = gl.load(v_exponent)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, k_bufs.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(empty.index(0), count=1)
    stage = 1
    phase = 0
    if TILES > 1:
        next_scale = q_scale * gl.load(k_scale + BN // BLOCK)
        next_exponent = gl.load(v_exponent + BN // BLOCK)
        mbarrier.wait(full.index(stage), phase)
        s_next = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
        p, m, alpha, row = _weigh(s, m, scale, exponent, 0, False, S, CODES, not ONES)
        if not ONES:
            sums = row * gl.exp2(-exponent)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)  # zeros, or NaN
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
            s_next = warpgroup_mma(q, k_bufs.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            acc_next = warpgroup_mma(p_buf, v_bufs.index(stage).permute((1, 0)), acc, is_async=True)
            if ONES:
                row_next = warpgroup_mma(p_buf, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
            p, m, alpha, row = _weigh(s, m, scale, exponent, i * BN, False, S, CODES, not ONES)
            if ONES:
                s, acc, rows = warpgroup_mma_wait(0, deps=[s_next, acc_next, row_next])
                many = (many + rows * shrink) * gl.expand_dims(gl.convert_layout(alpha, l_rows), 1)
            else:
                sums = sums * alpha + row * gl.exp2(-exponent)
                s, acc = warpgroup_mma_wait(0, deps=[s_next, acc_next])
            mbarrier.arrive(empty.index(stage), count=1)  # a barrier, too: all warps are done with p_buf
            p_buf.store(p)
            fence_async_shared()
            acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
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
            row_next = warpgroup_mma(p_buf, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
    p, m, alpha, row = _weigh(s, m, scale, exponent, (TILES - 1) * BN, MASK, S, CODES, not ONES)
    if not ONES:
        sums = sums * alpha + row * gl.exp2(-exponent)
    if TILES > 1:
        if ONES:
            acc, rows = warpgroup_mma_wait(0, deps=[acc_next, row_next])
            many = (many + rows * shrink) * gl.expand_dims(gl.convert_layout(alpha, l_rows), 1)
        else:
            acc = warpgroup_mma_wait(0, deps=[acc_next])
        mbarrier.arrive(empty.index(stage), count=1)
        acc = acc * gl.expand_dims(gl.convert_layout(alpha, o_rows), 1)
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
        row_next = warpgroup_mma(p_buf, ones.permute((1, 0)), nothing, use_acc=False, is_async=True)
        acc, rows = warpgroup_mma_wait(0, deps=[acc_next, row_next])
        many = many + rows * gl.exp2(-exponent)
        sums = gl.convert_layout(gl.max(many, axis=1), s_rows) + scale * 0.0
    else:
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
    p_bufs = gl.allocate_shared_memory(gl.float8e4nv, [2, 64, BN], p_rows)
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
