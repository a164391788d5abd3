"""What `hopper.attention` is made of: copying, queries, a tile's weights, the output."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

_MAGIC = gl.constexpr(12582912.0)  # 1.5 * 2^23: a float this large holds a whole number in its low bits
# 2^y in e4m3's own bits: 8 y + 120, rounded, is the code of about 2^(8 + y), at most 6 % off. Inputs are divided by
# 128, so that a saturating fma clamps to [0, 1]; adding 1.5 * 2^16 rounds to 128ths and leaves the code in the lowest
# byte of an otherwise empty half, and two such halves are put together by a multiplication.
_CODES = gl.constexpr(
    """
    {
    .reg .f32 f<4>;
    .reg .b32 b<4>, lo, hi;
    fma.rn.sat.f32 f0, $1, $5, $9;
    fma.rn.sat.f32 f1, $2, $6, $10;
    fma.rn.sat.f32 f2, $3, $7, $11;
    fma.rn.sat.f32 f3, $4, $8, $12;
    add.rn.f32 f0, f0, 0f47C00000;
    add.rn.f32 f1, f1, 0f47C00000;
    add.rn.f32 f2, f2, 0f47C00000;
    add.rn.f32 f3, f3, 0f47C00000;
    mov.b32 b0, f0;
    mov.b32 b1, f1;
    mov.b32 b2, f2;
    mov.b32 b3, f3;
    mad.lo.u32 lo, b1, 256, b0;
    mad.lo.u32 hi, b3, 256, b2;
    prmt.b32 $0, lo, hi, 0x5410;
    }
    """
)

# The same in packed halves: 1024 + 8 y + 120 in fp16 has the code in its low byte, rounded by the one multiply-add.
_HALF_CODES = gl.constexpr(
    """
    {
    .reg .b32 lo, hi, least;
    mov.b32 least, 0x64006400;
    fma.rn.f16x2 lo, $1, $3, $5;
    fma.rn.f16x2 hi, $2, $4, $6;
    max.f16x2 lo, lo, least;
    max.f16x2 hi, hi, least;
    prmt.b32 $0, lo, hi, 0x6420;
    }
    """
)


@gluon.jit
def load_tiles(k_desc, v_desc, buffers, S: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr):
    """The copying warp: slot j of the ring gets the keys of tile j and the values of tile j - 1."""
    _q_bufs, k_bufs, v_bufs, full, empty = buffers
    BN: gl.constexpr = k_desc.block_type.shape[0]
    D: gl.constexpr = k_desc.block_type.shape[1]
    TILES: gl.constexpr = (S + BN - 1) // BN
    bh = gl.program_id(1)
    stage = 0
    phase = 1
    for i in range(TILES + 1):
        mbarrier.wait(empty.index(stage), phase)
        bar = full.index(stage)
        keys = i < TILES
        values = i >= 1
        mbarrier.expect(bar, BN * D * 2, pred=keys & values)
        mbarrier.expect(bar, BN * D, pred=keys ^ values)
        tma.async_copy_global_to_shared(k_desc, [bh * PADDED + i * BN, 0], bar, k_bufs.index(stage), pred=keys)
        tma.async_copy_global_to_shared(v_desc, [bh * D, (i - 1) * BN], bar, v_bufs.index(stage), pred=values)
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
def read_queries(q, q_ptr, q_scale, first, last, rows: gl.constexpr):
    """64 rows of 8-bit queries [.., D] from `first` on, those before `last`, to `q`; returns their scales."""
    D: gl.constexpr = q.shape[1]
    wide: gl.constexpr = gl.BlockedLayout([1, 16], [512 // D, D // 16], [4, 1], [1, 0])
    t = first + gl.arange(0, 64, gl.SliceLayout(1, wide))
    at = gl.expand_dims(t.to(gl.int64) * D, 1) + gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, wide)), 0)
    q.store(gl.load(q_ptr + at, mask=gl.expand_dims(t < last, 1).broadcast_to((64, D))))
    fence_async_shared()
    gl.thread_barrier()
    t = first + gl.arange(0, 64, rows)
    return gl.load(q_scale + t, mask=t < last, other=0.0)


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
def weigh(s, m, scale, exponent, n, MASK: gl.constexpr, S: gl.constexpr, mma: gl.constexpr):
    """Weights of one tile (e4m3, keys in the order of the values), new maximum, factor for older sums, row sums."""
    p, new, alpha = _coded(s, m, scale, exponent, n, MASK, S, mma)
    return p, new, alpha, _row_sum(p.to(gl.float32))


@gluon.jit
def _coded(s, m, scale, exponent, n, MASK: gl.constexpr, S: gl.constexpr, mma: gl.constexpr):
    """What `weigh` gives, but for the sums."""
    ROWS: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[1]
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    rows: gl.constexpr = gl.SliceLayout(1, a_layout)
    s = s.to(gl.float32)
    if MASK:
        t = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        s = gl.where(gl.expand_dims(t < S, 0), s, float("-inf"))
    new = gl.maximum(m, gl.ceil(gl.fma(gl.convert_layout(_row_max(s), rows, assert_trivial=True), scale, exponent)))
    alpha = gl.exp2(m - new) + scale * 0.0  # a maximum may drop a NaN; scale * 0 brings it back
    top = exponent - new
    # Each thread keeps its numbers, which become those of four neighbouring keys.
    s = gl.reshape(gl.permute(gl.reshape(s, (ROWS, BN // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (ROWS, BN))
    s = gl.convert_layout(s, a_layout, assert_trivial=True)
    p = gl.inline_asm_elementwise(
        _CODES,
        "=r,f,f,f,f,f,f,f,f,f,f,f,f",
        [s, _across(scale * 0.0625, s.shape), _across(top * 0.0625 + 0.9375, s.shape)],
        dtype=gl.float8e4nv,
        is_pure=True,
        pack=4,
    )
    return p, new, alpha


@gluon.constexpr_function
def quads(warps=4):
    """[64, 4]: a thread's own two rows, and its place among the four threads that share them."""
    return gl.DistributedLinearLayout(
        [[8, 0]], [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 4]
    )


@gluon.jit
def _pairwise(asm: gl.constexpr, x):
    """[R, A, C] halves to [R, A / 2, C] by an operation on two packed pairs; A lies in registers."""
    R: gl.constexpr = x.shape[0]
    A: gl.constexpr = x.shape[1]
    C: gl.constexpr = x.shape[2]
    a, b = gl.split(gl.permute(gl.reshape(x, (R, 2, A // 2, C)), (0, 2, 3, 1)))
    return gl.inline_asm_elementwise(asm, "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)


@gluon.jit
def _half_max(h):
    """Maximum of each row of fp16 [R, C] as logits lie in registers; float32 [R]."""
    R: gl.constexpr = h.shape[0]
    x = gl.reshape(h, (R, h.shape[1] // 8, 8))
    for _ in gl.static_range(_log2(h.shape[1] // 8)):
        x = _pairwise("max.f16x2 $0, $1, $2;", x)
    return gl.max(gl.reshape(x, (R, 8)).to(gl.float32), axis=1)


@gluon.jit
def _half_sum(p):
    """Sums of what each thread holds of the rows of e4m3 weights [64, C]: float32 [64, 4].

    Up to 32 weights of at most 256 (a whole tile's are 2^15 at most), rounded to 11 bits.
    """
    R: gl.constexpr = p.shape[0]
    x = gl.reshape(p.to(gl.float16), (R, p.shape[1] // 16, 16))
    for _ in gl.static_range(_log2(p.shape[1] // 16)):
        x = _pairwise("add.rn.f16x2 $0, $1, $2;", x)
    x = gl.permute(gl.reshape(x, (R, 4, 2, 2)), (0, 1, 3, 2))
    a, b = gl.split(x)
    x = gl.inline_asm_elementwise("add.rn.f16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.float16, is_pure=True, pack=2)
    first, second = gl.split(x)
    return gl.convert_layout(first.to(gl.float32) + second.to(gl.float32), quads(), assert_trivial=True)


@gluon.constexpr_function
def _log2(n):
    return n.bit_length() - 1


@gluon.jit
def weigh_half(s, m, scale, exponent, n, MASK: gl.constexpr, S: gl.constexpr, mma: gl.constexpr):
    """`weigh` in packed halves; row sums are each thread's own, `quads`.

    Logits of float32 are read as fp16 (so |s| < 65,504); int8's are larger and only the sums are halves.
    """
    ROWS: gl.constexpr = s.shape[0]
    BN: gl.constexpr = s.shape[1]
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 4)
    rows: gl.constexpr = gl.SliceLayout(1, a_layout)
    if s.dtype == gl.float32:
        if MASK:
            t = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
            s = gl.where(gl.expand_dims(t < S, 0), s, float("-inf"))
        h = gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [s], dtype=gl.float16, is_pure=True, pack=2
        )
        most = gl.convert_layout(_half_max(h), rows, assert_trivial=True)
        new = gl.maximum(m, gl.ceil(gl.fma(most, scale, exponent)))
        alpha = gl.exp2(m - new) + scale * 0.0
        h = gl.reshape(gl.permute(gl.reshape(h, (ROWS, BN // 16, 2, 4, 2)), (0, 1, 3, 2, 4)), (ROWS, BN))
        h = gl.convert_layout(h, a_layout, assert_trivial=True)
        p = gl.inline_asm_elementwise(
            _HALF_CODES,
            "=r,r,r,r,r,r,r",
            [
                h,
                _across((scale * 8.0).to(gl.float16), h.shape),
                _across(((exponent - new) * 8.0 + 1144.0).to(gl.float16), h.shape),
            ],
            dtype=gl.float8e4nv,
            is_pure=True,
            pack=4,
        )
    else:
        p, new, alpha = _coded(s, m, scale, exponent, n, MASK, S, mma)
    return p, new, alpha, _half_sum(p)


@gluon.jit
def scaled(x, rows):
    """Each row of x times its number; the layouts differ in columns only."""
    return x * gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, x.type.layout)), 1)


@gluon.constexpr_function
def _rescaling(n):
    """Multiply n accumulators, pairs of two rows in turn, by their rows' factors, unless a warp has none but 1."""
    lines = [
        ".reg .pred p, q;",
        f"setp.neu.f32 p, ${2 * n}, 0f3F800000;",
        f"setp.neu.or.f32 p, ${2 * n + 2}, 0f3F800000, p;",
        "vote.sync.any.pred q, p, 0xffffffff;",
        "@!q bra DONE;",
        *(f"mul.f32 ${i}, ${i}, ${2 * n + (i & 2)};" for i in range(n)),
        "DONE:",
    ]
    return "{" + " ".join(lines) + "}"


@gluon.constexpr_function
def _rescaled_constraints(n):
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def rescaled(x, rows):
    """`scaled` of an accumulator of 64 rows by powers of two, which a warp leaves out where all are 1."""
    N: gl.constexpr = x.shape[1] // 2
    factors = gl.expand_dims(gl.convert_layout(rows, gl.SliceLayout(1, x.type.layout)), 1).broadcast_to(x.shape)
    return gl.inline_asm_elementwise(
        _rescaling(N), _rescaled_constraints(N), [x, factors], dtype=gl.float32, is_pure=True, pack=N
    )


@gluon.jit
def store_rows(y, out_ptr, strides, b, h, first, S: gl.constexpr):
    """64 rows of output to memory, those before S."""
    layout: gl.constexpr = y.type.layout
    t = first + gl.arange(0, 64, gl.SliceLayout(1, layout))
    d = gl.arange(0, y.shape[1], gl.SliceLayout(0, layout))
    at = out_ptr + b * strides[0] + h * strides[2] + gl.expand_dims(t.to(gl.int64) * strides[1], 1)
    inside = gl.expand_dims(t < S, 1).broadcast_to(y.shape)
    gl.store(at + gl.expand_dims(d, 0), y.to(out_ptr.dtype.element_ty), mask=inside)
