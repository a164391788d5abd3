"""What both orders of `hopper.attention` are made of: copying, queries, a tile's weights, the output."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

_MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2^23: a float this large holds a whole number in its low bits
_EXPONENT = gl.constexpr(1.329227995784916e36)  # 2^120, between e4m3's bits moved into a float and their value


@gluon.jit
def load_tiles(
    k_desc, v_desc, buffers, S: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr
):
    """The copying warp: slot j of the ring gets the keys of tile j and the values of tile j - 1, or j - 2."""
    _q_bufs, k_bufs, v_bufs, _p_bufs, _ones, full, empty = buffers
    BN: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    BEHIND: gl.constexpr = 2 if OVERLAP and TILES > 1 else 1
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
def quantize_queries(
    q, q_ptr, strides, b, h, first, factor, S: gl.constexpr, QMAX: gl.constexpr, FLOOR: gl.constexpr, rows: gl.constexpr
):
    """64 queries from memory to `q` in 8 bits, which nobody else reads; returns their scales times factor."""
    D: gl.constexpr = q.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    t = first + gl.arange(0, 64, gl.SliceLayout(1, wide))
    d = gl.arange(0, D, gl.SliceLayout(0, wide))
    at = q_ptr + b * strides[0] + h * strides[2] + gl.expand_dims(t.to(gl.int64) * strides[1], 1)
    x = gl.load(at + gl.expand_dims(d, 0), mask=gl.expand_dims(t < S, 1).broadcast_to((64, D)), other=0.0)
    x = x.to(gl.float32)
    # Zero, or NaN if there is one: a maximum alone may drop it.
    scale = gl.maximum(gl.max(gl.abs(x), axis=1), FLOOR) / QMAX + gl.sum(x * 0.0, axis=1)
    x = x * gl.expand_dims(1.0 / scale, 1)
    if q.dtype == gl.int8:
        x = x + _MAGIC - _MAGIC  # to the nearest integer, ties to even
    q.store(x.to(q.dtype))
    fence_async_shared()
    gl.thread_barrier()
    return gl.convert_layout(scale * factor, rows)


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
def _across(rows, shape: gl.constexpr):
    return gl.expand_dims(rows, 1).broadcast_to(shape)


@gluon.jit
def weigh(s, m, scale, exponent, n, MASK: gl.constexpr, S: gl.constexpr, CODES: gl.constexpr, SUM: gl.constexpr):
    """Weights of one tile (e4m3, keys in the order of the values), new maximum, factor for older sums, row sums."""
    ROWS: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[1]
    s = s.to(gl.float32)
    if MASK:
        t = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(t < S, 0), s, float("-inf"))
    new = gl.maximum(m, gl.ceil(gl.fma(_row_max(s), scale, exponent)))
    alpha = gl.exp2(m - new) + scale * 0.0  # a maximum may drop a NaN; scale * 0 brings it back
    top = exponent - new
    sums = alpha
    if CODES:
        # 2^y in e4m3's own bits: 8 y + 120 rounded is the code of about 2^(8 + y), at most 6 % off. All constants but
        # the slope are whole numbers, so that nothing but s is rounded.
        code = gl.fma(s, _across(scale * 8.0, s.shape), _across(top * 8.0 + (120.0 + _MAGIC), s.shape))
        code = gl.maximum(code, _MAGIC).to(gl.int32, bitcast=True)
        if SUM:
            sums = _row_sum((code << 20).to(gl.float32, bitcast=True)) * _EXPONENT
        p = code.to(gl.uint8).to(gl.float8e4nv, bitcast=True)
    else:
        wide = gl.exp2(gl.fma(s, _across(scale, s.shape), _across(top + 8.0, s.shape)))
        if SUM:
            sums = _row_sum(wide)
        p = wide.to(gl.float8e4nv)
    p = gl.permute(gl.reshape(p, (ROWS, BN // 16, 2, 4, 2)), (0, 1, 3, 2, 4))
    return gl.reshape(p, (ROWS, BN)), new, alpha, sums


@gluon.jit
def scaled(x, rows):
    """Each row of x times its number; the layouts differ in columns only."""
    return x * gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.jit
def store_rows(y, out_ptr, strides, b, h, first, S: gl.constexpr):
    """64 rows of output to memory, those before S."""
    layout: gl.constexpr = y.type.layout
    t = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    at = out_ptr + b * strides[0] + h * strides[2] + gl.expand_dims(t.to(gl.int64) * strides[1], 1)
    inside = gl.expand_dims(t < S, 1).broadcast_to(y.shape)
    gl.store(at + gl.expand_dims(d, 0), y.to(out_ptr.dtype.element_ty), mask=inside)
