"""The product of one row, thread by thread: its assembly is interpreted here, since no interpreter runs Gluon."""

import re

import numpy as np
import pytest
import torch

from tritflow.formats.packing import pack_2bit
from tritflow.kernels.hopper import why_not_compile

pytestmark = pytest.mark.skipif(why_not_compile() is not None, reason=str(why_not_compile()))

LANES = np.arange(32)


def _bytes(word):
    return np.stack([(word >> (8 * i)) & 0xFF for i in range(4)], -1).astype(np.uint8)


def _prmt(a, b, selector):
    pool = np.concatenate([_bytes(a), _bytes(b)], -1)
    return sum(pool[:, (selector >> (4 * i)) & 7].astype(np.uint32) << (8 * i) for i in range(4))


def _mma(a, b, c):
    """m16n8k32 of signed bytes: fragments as the PTX manual lays them over the lanes of a warp."""
    group, thread = LANES // 4, LANES % 4
    left, right, sums = np.zeros((16, 32), int), np.zeros((32, 8), int), np.zeros((16, 8), int)
    for i in range(4):
        left[(group + 8 * (i % 2))[:, None], thread[:, None] * 4 + np.arange(4) + 16 * (i // 2)] = _bytes(a[i]).view(
            "i1"
        )
        sums[group + 8 * (i // 2), 2 * thread + i % 2] = c[i].astype(np.uint32).view(np.int32)
    for i in range(2):
        right[thread[:, None] * 4 + np.arange(4) + 16 * i, group[:, None]] = _bytes(b[i]).view("i1")
    done = (sums + left @ right).astype(np.int64)
    return [(done[group + 8 * (i // 2), 2 * thread + i % 2] & 0xFFFFFFFF).astype(np.uint32) for i in range(4)]


def run(text, operands):
    """Interpret a block of assembly for a warp: operands are words [32] by number; returns all of them."""
    values = {f"${i}": np.asarray(v, np.uint32) for i, v in operands.items()}

    def read(name):
        return np.full(32, int(name, 16), np.uint32) if name.startswith("0x") else values[name]

    simple = {
        "and.b32": np.bitwise_and,
        "or.b32": np.bitwise_or,
        "xor.b32": np.bitwise_xor,
        "sub.u32": np.subtract,
    }
    for line in re.sub(r"^\s*\{|\}\s*$", "", text.strip()).split(";"):
        opcode, _, rest = line.strip().partition(" ")
        if not opcode or opcode == ".reg":
            continue
        groups = re.findall(r"\{([^}]*)\}|([^,{}\s]+)", rest)
        names = [[n.strip() for n in many.split(",")] if many else one for many, one in groups]
        if opcode.startswith("mma"):
            found = _mma(*([read(n) for n in names[i]] for i in (1, 2, 3)))
            values |= dict(zip(names[0], found, strict=True))
            continue
        out, *rest = names
        if opcode == "shl.b32":
            values[out] = read(rest[0]) << np.uint32(int(rest[1]))
        elif opcode == "mov.b32":
            values[out] = np.zeros(32, np.uint32) if rest[0] == "0" else read(rest[0]).copy()
        elif opcode == "prmt.b32":
            values[out] = _prmt(read(rest[0]), read(rest[1]), int(rest[2], 16))
        elif opcode == "lop3.b32":
            assert rest[3] == "0x6a"
            values[out] = (read(rest[0]) & read(rest[1])) ^ read(rest[2])
        elif opcode == "fma.rn.f32":
            x, y, z = (read(n).view(np.float32).astype(np.float64) for n in rest)
            values[out] = (x * y + z).astype(np.float32).view(np.uint32)  # one rounding: a product of these is exact
        elif opcode == "max.u16x2":
            a, b = (read(n).copy().view(np.uint16) for n in rest)
            values[out] = np.maximum(a, b).view(np.uint32)
        else:
            values[out] = simple[opcode](read(rest[0]), read(rest[1]))
    return {int(name[1:]): v for name, v in values.items() if name.startswith("$")}


def places(layout, warp):
    """Where registers (rows) of a warp's lanes (columns) lie in a tensor of a layout, as a tuple of indices."""

    def spread(bases, numbers):
        return sum((((numbers >> i) & 1)[:, None] * np.array(base) for i, base in enumerate(bases)), 0)

    registers = spread(layout.reg_bases, np.arange(1 << len(layout.reg_bases)))
    lanes = spread(layout.lane_bases, LANES)
    where = registers[:, None] ^ lanes[None] ^ spread(layout.warp_bases, np.array([warp]))[None]
    return tuple(np.moveaxis(where, -1, 0))


def product(x, weight, scale, parts):
    """`one_row_kernel` for 16 rows, with its layouts, reshapes and assembly."""
    from tritflow.kernels.hopper import one_row as kernel

    width = weight.shape[1]
    span = parts * 64
    count = -(-width // span)
    packed = np.zeros((16, count * span), np.uint8)
    packed[:, :width] = weight.numpy()
    words = packed.view(np.uint32).reshape(16, count, parts, 16)
    row = np.zeros(count * span * 4, np.int16)
    row[: len(x)] = x.view(torch.int16).numpy()
    row = row.view(np.uint32).reshape(count, parts, 128)
    x_layout, w_layout, b_layout = (
        getattr(f(parts), "value", f(parts)) for f in (kernel._row_layout, kernel.words_layout, kernel._digits_layout)
    )
    y = np.zeros(16)
    for part in range(parts):
        at_x, at_w, at_b = places(x_layout, part), places(w_layout, part), places(b_layout, part)
        largest = np.zeros((4, 32), np.uint32)
        for s in range(count):
            for i in range(4):
                largest[i] = run(kernel._LARGER.value, {1: largest[i], 2: row[s][at_x][i]})[0]
        exponent = int(np.maximum(largest & 0xFFFF, largest >> 16).max()) >> 7
        power = min(274 - exponent, 253)
        factor = np.full(32, power << 23, np.uint32)
        back = float("nan") if exponent == 255 else 2.0 ** (127 - power)
        sums = [np.zeros((4, 32), np.uint32) for _ in range(4)]
        shared = []
        for s in range(count):
            found = run(kernel._DIGITS.value, dict(enumerate(row[s][at_x], 8)) | dict.fromkeys(range(12, 16), factor))
            both = np.zeros((parts, 128, 2), np.uint32)
            for high in range(2):
                for i in range(4):
                    both[(at_x[0][i], at_x[1][i], high)] = found[4 * high + i]
            digits = both.reshape(parts, 2, 4, 2, 2, 2, 2, 2).transpose(2, 0, 7, 5, 1, 3, 4, 6).reshape(4, parts, 4, 16)
            planes = np.random.default_rng(s).integers(0, 1 << 32, (4, parts, 8, 16), dtype=np.uint32)
            planes[:, :, :4] = digits
            shared.append(planes[at_b].reshape(4, 4, 32))
            given = dict(enumerate(shared[s][:3].reshape(12, 32), 12)) | dict(enumerate(np.concatenate(sums[:3]), 24))
            done = run(kernel._CORRECTIONS.value, given)
            sums[:3] = [np.stack([done[4 * f + i] for i in range(4)]) for f in range(3)]
        for s in range(count):
            upper, lower = words[:8, s].transpose(1, 0, 2)[at_w], words[8:, s].transpose(1, 0, 2)[at_w]
            given = dict(enumerate(np.concatenate([upper, lower, shared[s].reshape(16, 32), *sums]), 16))
            done = run(kernel._PRODUCTS.value, given)
            sums = [np.stack([done[4 * f + i] for i in range(4)]) for f in range(4)]
        total = (sums[3] + 4 * sums[2] + 16 * sums[1] + 64 * sums[0]).view(np.int32)
        tile = np.zeros((parts, 8, 16), np.int32)
        tile[at_w] = total
        column = np.arange(4)[:, None] * 2 + np.arange(2)
        weighting = np.where(column == 0, 1.0, np.where(column == 1, 256.0, np.where(column == 2, 65536.0, 0.0)))
        shaped = tile[part].reshape(8, 4, 2, 2).astype(np.float32) * (weighting[:, None] * back / 64)
        y += shaped.sum((1, 3)).T.reshape(16)
    return y * scale


@pytest.mark.parametrize(("k", "parts"), [(3072, 4), (1024, 4), (3072, 2), (768, 2)])
@pytest.mark.parametrize("kind", ["normal", "positive", "outliers", "large", "tiny"])
def test_sums_are_those_of_float64(k, parts, kind):
    generator = torch.Generator().manual_seed(k + parts)
    x = torch.randn(k, generator=generator)
    if kind == "positive":
        x = x.abs() + 3
    elif kind == "outliers":
        x[::97] *= 3000
    x *= {"large": 1e37, "tiny": 1e-30}.get(kind, 1.0)
    x = x.bfloat16()
    trits = torch.randint(-1, 2, (16, k), generator=generator, dtype=torch.int8)
    y = product(x, pack_2bit(trits), 0.5, parts)
    expected = 0.5 * (trits.double() @ x.double()).numpy()
    assert np.linalg.norm(y - expected) <= 1.4e-5 * np.linalg.norm(expected)
    # No sum is further off than rounding every activation to 2^-21 of the largest one explains.
    assert np.abs(y - expected).max() <= 0.5 * k**0.5 * x.abs().max().item() * 2.0**-20


def test_what_is_no_number_stays_none():
    for value in (float("nan"), float("inf")):
        x = torch.ones(1024, dtype=torch.bfloat16)
        x[77] = value
        trits = torch.ones(16, 1024, dtype=torch.int8)
        assert np.isnan(product(x, pack_2bit(trits), 1.0, 4)).all()
    assert (product(torch.zeros(1024, dtype=torch.bfloat16), pack_2bit(trits), 1.0, 4) == 0).all()


class _Kernel:
    """In a kernel's place: keeps what it was launched with."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((grid, options))


def test_what_digits_do_not_take_runs_as_without_rows(monkeypatch):
    from tritflow.kernels.hopper import one_row, skinny

    digits, plain = _Kernel(), _Kernel()
    monkeypatch.setattr(one_row, "one_row_kernel", digits)
    monkeypatch.setattr(skinny, "w2a16_skinny_kernel", plain)
    for m, k, rows in ((1, 256, 48), (1, 256, None), (2, 256, 48), (1, 8192, 48)):
        x, weight = torch.zeros(m, k, dtype=torch.bfloat16), torch.zeros(96, k // 4, dtype=torch.uint8)
        skinny.w2a16_skinny(x, weight, torch.ones(96), rows=rows, digits=True, early=True)
    assert [(grid, options["ROWS"], options["launch_pdl"]) for grid, options in digits.launches] == [
        ((2,), 48, True),
        ((6,), 16, True),
    ]
    assert [(options["ROWS"], options["maxnreg"]) for _, options in plain.launches] == [(32, 96), (16, 56)]
