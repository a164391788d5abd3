"""Ternary weights times one row of bf16, as sums of integers: `skinny`'s product in fewer instructions.

The tensor cores take eight columns of activations and one row fills one of them. So the row becomes a fixed-point
number of 22 bits against the largest magnitude of its part of K, and its three signed bytes are three columns. Each
32-bit word of weights gives four operands of four trits, by one instruction each: field f is masked where it lies and
reads as (trit + 2) 4^f, the top one as 64 trit. A sum for each field keeps these scales apart; what the 2 adds is taken
off by a product of the same activations with a constant, while the weights are still on their way. Integer sums are
exact, so all that is rounded is the fixed point, by 2^-21 of the largest activation of a part at most, and the result.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritflow.kernels.hopper.skinny import request_weights, wait_for_the_kernel_before

_FIELDS = ((0x03030303, 0x02020202), (0x0C0C0C0C, 0x08080808), (0x30303030, 0x20202020), (0xC0C0C0C0, 0))
_OFFSETS = (0xFEFEFEFE, 0xF8F8F8F8, 0xE0E0E0E0)  # -2, -8 and -32 in every byte
_MMA = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"


def _four(first: int) -> str:
    return "{" + ", ".join(f"${first + i}" for i in range(4)) + "}"


def _products() -> str:
    """Two rows' 16 bytes a lane (operands 16 to 23) times the four fields' digits (24 to 39), onto sums (40 to 55)."""
    lines = ["{ .reg .b32 a<4>, s<4>, flip;"]
    for field, (mask, flip) in enumerate(_FIELDS):
        digits, before, after = 24 + 4 * field, 40 + 4 * field, 4 * field
        lines.append(f"mov.b32 flip, {flip:#x};")
        for pair in (0, 2):
            for i, word in enumerate((16 + pair, 20 + pair, 17 + pair, 21 + pair)):
                decoded = f"lop3.b32 a{i}, ${word}, {mask:#x}, flip, 0x6a;"  # (word & mask) ^ flip
                lines.append(decoded if flip else f"and.b32 a{i}, ${word}, {mask:#x};")
            source = _four(before) if pair == 0 else "{s0, s1, s2, s3}"
            target = _four(after) if pair else "{s0, s1, s2, s3}"
            columns = f"{{${digits + pair}, ${digits + pair + 1}}}"
            lines.append(f"{_MMA} {target}, {{a0, a1, a2, a3}}, {columns}, {source};")
    return "\n".join([*lines, "}"])


def _corrections() -> str:
    """Takes what the fields' 2 adds off three sums: digits are operands 12 to 23, sums 24 to 35."""
    lines = ["{ .reg .b32 a, s<4>;"]
    for field, offset in enumerate(_OFFSETS):
        digits, before, after = 12 + 4 * field, 24 + 4 * field, 4 * field
        lines += [
            f"mov.b32 a, {offset:#x};",
            f"{_MMA} {{s0, s1, s2, s3}}, {{a, a, a, a}}, {{${digits}, ${digits + 1}}}, {_four(before)};",
            f"{_MMA} {_four(after)}, {{a, a, a, a}}, {{${digits + 2}, ${digits + 3}}}, {{s0, s1, s2, s3}};",
        ]
    return "\n".join([*lines, "}"])


def _digits() -> str:
    """Eight bf16 (operands 8 to 11) times a scale (12 to 15, all alike) to words of digits 0 and 1, then of digit 2.

    A multiply-add leaves the integer in its result's low bits; 0x8080 is added, so that the lower bytes are signed.
    """
    lines = ["{ .reg .f32 x, c; .reg .b32 h, y<4>, p, q; mov.b32 c, 0x4B408080;"]
    for half in (0, 1):
        for i in range(4):
            word = 8 + 2 * half + i // 2
            lines.append(f"shl.b32 h, ${word}, 16;" if i % 2 == 0 else f"and.b32 h, ${word}, 0xFFFF0000;")
            lines += ["mov.b32 x, h;", "fma.rn.f32 x, x, $12, c;", f"mov.b32 y{i}, x;"]
        lines += [
            "prmt.b32 p, y0, y1, 0x5140;",
            "prmt.b32 q, y2, y3, 0x5140;",
            "prmt.b32 h, p, q, 0x5410;",
            f"xor.b32 ${half}, h, 0x80808080;",
            "prmt.b32 h, p, q, 0x7632;",
            f"xor.b32 ${2 + half}, h, 0x80808080;",
            "prmt.b32 p, y0, y1, 0x0062;",
            "prmt.b32 q, y2, y3, 0x0062;",
            "prmt.b32 h, p, q, 0x5410;",
            # The top digit has 64 too much, a byte without borrow: (h + 128 - 64) - 128.
            "or.b32 h, h, 0x80808080;",
            "sub.u32 h, h, 0x40404040;",
            f"xor.b32 ${4 + half}, h, 0x80808080;",
        ]
    return "\n".join([*lines, "mov.b32 $6, 0;", "mov.b32 $7, 0;", "}"])


def _registers(outputs: int, inputs: int) -> str:
    return ",".join(["=r"] * outputs + ["r"] * inputs)


_PRODUCTS, _PRODUCTS_IO = gl.constexpr(_products()), gl.constexpr(_registers(16, 40))
_CORRECTIONS, _CORRECTIONS_IO = gl.constexpr(_corrections()), gl.constexpr(_registers(12, 24))
_DIGITS, _DIGITS_IO = gl.constexpr(_digits()), gl.constexpr("=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,f,f,f,f")
_LARGER = gl.constexpr("{ .reg .b32 a; and.b32 a, $2, 0x7FFF7FFF; max.u16x2 $0, $1, a; }")


@gluon.constexpr_function
def _warps(parts, dims):
    found: list[list[int]] = []
    part = 1
    while part < parts:
        found = [*found, [part if i == dims[0] else 0 for i in range(dims[1])]]
        part *= 2
    return found


@gluon.constexpr_function
def words_layout(parts):
    """[parts, 8, 16] words, a warp a part; lane (row % 8, quarter) holds four words: a product's operands and sums."""
    lanes = [[0, 0, 4], [0, 0, 8], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout([[0, 0, 1], [0, 0, 2]], lanes, _warps(parts, (0, 3)), [], [parts, 8, 16])


@gluon.constexpr_function
def _digits_layout(parts):
    """[fields, parts, 8, 16] words: those of all fields in the lane whose weights they are multiplied with."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2], [1, 0, 0, 0], [2, 0, 0, 0]]
    lanes = [[0, 0, 0, 4], [0, 0, 0, 8], [0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, _warps(parts, (1, 4)), [], [4, parts, 8, 16])


@gluon.constexpr_function
def _row_layout(parts):
    """[parts, 128] pairs of activations, a warp a part, a lane four pairs."""
    lanes = [[0, 4], [0, 8], [0, 16], [0, 32], [0, 64]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2]], lanes, _warps(parts, (0, 2)), [], [parts, 128])


@gluon.constexpr_function
def _sums_layout(parts):
    """[parts, 16] sums of a block's warps: those of a weight row in one lane."""
    registers: list[list[int]] = []
    part = 1
    while part < parts:
        registers = [*registers, [part, 0]]
        part *= 2
    lanes = [[0, 1], [0, 2], [0, 4], [0, 8], [0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0] for _ in registers], [], [parts, 16])


@gluon.jit
def read_words(weight, row, N, BYTES: gl.constexpr, PARTS: gl.constexpr, ROWS: gl.constexpr, WHOLE: gl.constexpr):
    """All words of a block's rows: a tuple over spans of K and groups of eight rows. WHOLE: all rows exist."""
    layout: gl.constexpr = words_layout(PARTS)
    parts = gl.arange(0, PARTS, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    rows = gl.arange(0, 8, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    words = gl.arange(0, 16, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    columns = gl.expand_dims(gl.expand_dims(parts, 1), 2) * 16 + gl.expand_dims(gl.expand_dims(words, 0), 1)
    of_row = row + gl.expand_dims(gl.expand_dims(rows, 0), 2)
    at = weight.to(gl.pointer_type(gl.int32), bitcast=True) + (of_row.to(gl.int64) * (BYTES // 4) + columns)
    found = ()
    for c in gl.static_range(0, BYTES, PARTS * 64):
        for i in gl.static_range(0, ROWS, 8):
            here = at + (i * BYTES + c) // 4
            if WHOLE and c + PARTS * 64 <= BYTES:
                asked = gl.load(here, eviction_policy="evict_first")
            else:
                inside = (of_row + i < N) & (columns + c // 4 < BYTES // 4)
                asked = gl.load(here, mask=inside, other=0, eviction_policy="evict_first")
            found += (asked,)  # type: ignore[assignment]
    return found


@gluon.jit
def _read_row(x, K: gl.constexpr, BYTES: gl.constexpr, PARTS: gl.constexpr):
    """The row as pairs of activations: a tuple over spans of K."""
    layout: gl.constexpr = _row_layout(PARTS)
    SPAN: gl.constexpr = PARTS * 64
    parts = gl.arange(0, PARTS, gl.SliceLayout(1, layout))
    pairs = gl.arange(0, 128, gl.SliceLayout(0, layout))
    pair = gl.expand_dims(parts, 1) * 128 + gl.expand_dims(pairs, 0)
    x_at = x.to(gl.pointer_type(gl.int32), bitcast=True) + pair
    row_of = ()
    for s in gl.static_range((BYTES + SPAN - 1) // SPAN):
        if (s + 1) * SPAN * 4 > K:
            row_of += (gl.load(x_at + s * SPAN * 2, mask=pair + s * SPAN * 2 < K // 2, other=0),)  # type: ignore[assignment]
        else:
            row_of += (gl.load(x_at + s * SPAN * 2),)  # type: ignore[assignment]
    return row_of


@gluon.jit
def _columns(planes, PARTS: gl.constexpr):
    """The four fields' digits, each where the weights are that it is multiplied with."""
    layout: gl.constexpr = words_layout(PARTS)
    both = gl.reshape(gl.permute(planes.load(_digits_layout(PARTS)), (1, 2, 3, 0)), (PARTS, 8, 16, 2, 2))
    even, odd = gl.split(both)
    b0, b2 = gl.split(even)
    b1, b3 = gl.split(odd)
    b0 = gl.convert_layout(b0, layout, assert_trivial=True)
    b1 = gl.convert_layout(b1, layout, assert_trivial=True)
    b2 = gl.convert_layout(b2, layout, assert_trivial=True)
    b3 = gl.convert_layout(b3, layout, assert_trivial=True)
    return b0, b1, b2, b3


@gluon.jit
def _corrected(sums, columns):
    return gl.inline_asm_elementwise(
        _CORRECTIONS,
        _CORRECTIONS_IO,
        [columns[0], columns[1], columns[2], sums[0], sums[1], sums[2]],
        dtype=(gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _multiplied(upper, lower, columns, sums):
    return gl.inline_asm_elementwise(
        _PRODUCTS,
        _PRODUCTS_IO,
        [upper, lower, columns[0], columns[1], columns[2], columns[3], sums[0], sums[1], sums[2], sums[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32),
        is_pure=True,
        pack=4,
    )


@gluon.jit(do_not_specialize=["N"])
def one_row_kernel(
    x,
    weight,
    weight_scale,
    bias,
    out,
    N,
    K: gl.constexpr,
    BYTES: gl.constexpr,
    PARTS: gl.constexpr,
    ROWS: gl.constexpr,
    WHOLE: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EARLY: gl.constexpr,
):
    """out[row:row + ROWS] of x [K] bf16 and weight [N, BYTES]; launch with PARTS warps, each with its part of K."""
    layout: gl.constexpr = words_layout(PARTS)
    x_layout: gl.constexpr = _row_layout(PARTS)
    SPAN: gl.constexpr = PARTS * 64
    COUNT: gl.constexpr = (BYTES + SPAN - 1) // SPAN
    TILES: gl.constexpr = ROWS // 16
    row = gl.program_id(0) * ROWS
    if EARLY:
        request_weights(weight, row, N, BYTES, ROWS, False)
        wait_for_the_kernel_before()
    # All that is read is asked for first, the row before the weights: behind them it waited in the memory's queues.
    row_of = _read_row(x, K, BYTES, PARTS)
    words = read_words(weight, row, N, BYTES, PARTS, ROWS, WHOLE)

    # Where a column of digits counts: lane t has columns 2 t and 2 t + 1, of which 0, 1 and 2 are digits.
    zero = gl.zeros((PARTS, 8, 16), gl.int32, layout)
    shaped = gl.reshape(zero, (PARTS, 8, 4, 2, 2)).to(gl.float32)
    shape_layout: gl.constexpr = shaped.type.layout
    l3: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, shape_layout))))
    l4: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, shape_layout))))
    quarter = gl.arange(0, 4, l3)
    quarter = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(quarter, 0), 1), 3), 4)
    column = gl.arange(0, 2, l4)
    column = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(column, 0), 1), 2), 3)
    column = quarter * 2 + column
    weighting = gl.where(column == 0, 1.0, gl.where(column == 1, 256.0, gl.where(column == 2, 65536.0, 0.0)))

    y_layout: gl.constexpr = _sums_layout(PARTS)
    out_row = row + gl.arange(0, 16, gl.SliceLayout(0, y_layout))
    scales = ()
    biases = ()
    for tile in gl.static_range(TILES):
        at = out_row + 16 * tile
        scales += (gl.load(weight_scale + at, mask=at < N, other=0.0),)  # type: ignore[assignment]
        if HAS_BIAS:
            biases += (gl.load(bias + at, mask=at < N, other=0.0),)  # type: ignore[assignment]

    gl.thread_barrier()  # else the assembler, to save registers, asks for weights when the row has come

    # The largest magnitude of a part, as bits: bf16 without its sign grows as an integer does, NaN above all.
    largest = gl.zeros((PARTS, 128), gl.int32, x_layout)
    for s in gl.static_range(COUNT):
        largest = gl.inline_asm_elementwise(
            _LARGER, "=r,r,r", [largest, row_of[s]], dtype=gl.int32, is_pure=True, pack=1
        )
    largest = gl.max(gl.maximum(largest & 0xFFFF, largest >> 16), axis=1)
    exponent = largest >> 7
    power = gl.minimum(274 - exponent, 253)  # so that |x| < 2^(exponent - 126) becomes less than 2^21
    scale = (power << 23).to(gl.float32, bitcast=True)
    back = ((254 - power) << 23).to(gl.float32, bitcast=True)
    back = gl.where(exponent == 255, float("nan"), back)
    scale = gl.expand_dims(scale, 1).broadcast_to((PARTS, 128))

    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[3, 2, 1, 0])
    shared = ()
    for s in gl.static_range(COUNT):
        low, high = gl.inline_asm_elementwise(
            _DIGITS, _DIGITS_IO, [row_of[s], scale], dtype=(gl.int32, gl.int32), is_pure=True, pack=4
        )
        # (part, high bit of k, field, next, half, digit low, word, digit high)
        digits = gl.reshape(gl.join(low, high), (PARTS, 2, 4, 2, 2, 2, 2, 2))
        digits = gl.reshape(gl.permute(digits, (2, 0, 7, 5, 1, 3, 4, 6)), (4, PARTS, 4, 16))
        # Columns 4 to 7 stay as they are: what they are multiplied with is not looked at.
        planes = gl.allocate_shared_memory(gl.int32, [4, PARTS, 8, 16], plain)
        planes.slice(0, 4, 2).store(digits)
        shared += (planes,)  # type: ignore[assignment]

    corrections = (zero, zero, zero)
    columns = ()
    for s in gl.static_range(COUNT):
        columns += (_columns(shared[s], PARTS),)  # type: ignore[assignment]
        corrections = _corrected(corrections, columns[s])
    back_layout: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, shape_layout))))
    back = gl.convert_layout(back, back_layout)
    back = gl.expand_dims(gl.expand_dims(gl.expand_dims(gl.expand_dims(back, 1), 2), 3), 4)
    weighting = weighting * (back * 0.015625)
    of_parts = ()
    for tile in gl.static_range(TILES):
        sums = (corrections[0], corrections[1], corrections[2], zero)
        for s in gl.static_range(COUNT):
            upper, lower = words[(s * TILES + tile) * 2], words[(s * TILES + tile) * 2 + 1]
            sums = _multiplied(upper, lower, columns[s], sums)
        total = sums[3] + 4 * sums[2] + 16 * sums[1] + 64 * sums[0]
        total = gl.reshape(total, (PARTS, 8, 4, 2, 2)).to(gl.float32) * weighting
        part = gl.permute(gl.sum(gl.sum(total, axis=4), axis=2), (0, 2, 1))
        kept = gl.allocate_shared_memory(gl.float32, [PARTS, 16], gl.SwizzledSharedLayout(1, 1, 1, order=[1, 0]))
        kept.store(gl.reshape(part, (PARTS, 16)))
        of_parts += (kept,)  # type: ignore[assignment]
    for tile in gl.static_range(TILES):
        y = gl.sum(of_parts[tile].load(y_layout), axis=0) * scales[tile].to(gl.float32)
        if HAS_BIAS:
            y = y + biases[tile].to(gl.float32)
        at = out_row + 16 * tile
        gl.store(out + at, y.to(gl.bfloat16), mask=at < N)
    for s in gl.static_range(COUNT):
        shared[s]._keep_alive()  # else sums would take the digits' place, behind one more barrier
