"""The two packings: layout by worked example, round trips, and refusal of bytes that no trits make."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tritflow.formats.errors import CheckpointError
from tritflow.formats.packing import (
    check_2bit,
    pack,
    pack_2bit,
    pack_base3,
    packed_width,
    repack,
    unpack,
    unpack_2bit,
    unpack_base3,
)


def random_trits(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)


def test_2bit_layout_matches_the_specification_bit_for_bit() -> None:
    trits = random_trits(3, 300)
    packed = pack_2bit(trits)
    assert packed.shape == (3, 96)
    code = {0: 0b00, 1: 0b01, -1: 0b11}
    for n in range(3):
        for b in range(3):
            for j in range(32):
                expected = 0
                for f in range(4):
                    k = 128 * b + 32 * f + j
                    expected |= code[int(trits[n, k]) if k < 300 else 0] << (2 * f)
                assert int(packed[n, 32 * b + j]) == expected


@pytest.mark.parametrize("field", range(4))
def test_one_shift_and_one_mask_decode_a_field(field: int) -> None:
    trits = random_trits(2, 128)
    byte = pack_2bit(trits)
    decoded = ((byte << (6 - 2 * field)) & 0xC0).view(torch.int8)
    assert torch.equal(decoded, trits[:, 32 * field : 32 * field + 32] * 64)


def test_base3_layout_matches_the_specification() -> None:
    packed = pack_base3(torch.tensor([[1, 0, -1, -1, 1, 1]], dtype=torch.int8))
    assert packed.tolist() == [[2 + 1 * 3 + 0 * 9 + 0 * 27 + 2 * 81, 2 + 1 * 3 + 1 * 9 + 1 * 27 + 1 * 81]]


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 400), seed=st.integers(0, 2**31))
def test_round_trips(rows: int, columns: int, seed: int) -> None:
    trits = random_trits(rows, columns, seed)
    for packing in ("2bit", "base3"):
        packed = pack(trits, packing)
        assert packed.dtype == torch.uint8
        assert packed.shape == (rows, packed_width(columns, packing))
        assert torch.equal(unpack(packed, columns, packing), trits)
        assert torch.equal(unpack(packed, columns, packing, check=False), trits)
    assert torch.equal(repack(pack_2bit(trits), columns, "2bit", "base3"), pack_base3(trits))
    assert torch.equal(repack(pack_base3(trits), columns, "base3", "2bit"), pack_2bit(trits))


def test_layers_larger_than_a_slab_and_strided_views() -> None:
    trits = random_trits(3000, 3072)
    assert torch.equal(unpack_2bit(pack_2bit(trits), 3072), trits)
    assert torch.equal(unpack_base3(pack_base3(trits), 3072), trits)
    view = trits.t()[:40, ::2]
    assert torch.equal(unpack_2bit(pack_2bit(view), view.shape[1]), view)
    assert torch.equal(unpack_base3(pack_base3(view), view.shape[1]), view)


def test_invalid_code_names_the_row() -> None:
    packed = pack_2bit(random_trits(5, 256))
    packed[3, 17] = (packed[3, 17] & 0b11110011) | 0b00001000
    with pytest.raises(CheckpointError, match="row 3 holds the 2-bit code 10"):
        unpack_2bit(packed, 256)
    with pytest.raises(CheckpointError, match="row 3"):
        check_2bit(packed, 256)


@pytest.mark.parametrize("byte", [0, 1, 7, 8, 2047, 262143, 262144, 299999])
@pytest.mark.parametrize("field", range(4))
def test_one_invalid_code_is_found_wherever_it_is(byte: int, field: int) -> None:
    """Also in the last, incomplete run of words, and in rows that are a part of a larger matrix."""
    packed = torch.full((3125, 96), 0b11010011, dtype=torch.uint8)
    check_2bit(packed, 384)
    packed.view(-1)[byte] = packed.view(-1)[byte] & ~(3 << 2 * field) | 2 << 2 * field
    with pytest.raises(CheckpointError, match=f"row {byte // 96} holds the 2-bit code 10"):
        check_2bit(packed, 384)
    row = byte // 96
    with pytest.raises(CheckpointError, match="row 1 holds"):
        check_2bit(packed[row - 1 : row + 2] if row else torch.cat([packed[1:2], packed[:1]]), 384)


@pytest.mark.parametrize("tail", [1, 31, 32, 100, 127])
def test_nonzero_padding_is_refused_at_every_padded_position(tail: int) -> None:
    packed = pack_2bit(random_trits(2, 128 + tail))
    for k in range(tail, 128):
        damaged = packed.clone()
        damaged[1, 32 + k % 32] |= 1 << (2 * (k // 32))
        with pytest.raises(CheckpointError, match="nonzero padding"):
            unpack_2bit(damaged, 128 + tail)


def test_base3_refuses_large_bytes_and_nonzero_padding() -> None:
    packed = pack_base3(random_trits(4, 12))
    large = packed.clone()
    large[2, 1] = 243
    with pytest.raises(CheckpointError, match="row 2 holds the byte 243"):
        unpack_base3(large, 12)
    padded = packed.clone()
    padded[0, 2] += 9  # third digit of the last byte: trit 12, one past the end
    with pytest.raises(CheckpointError, match="nonzero padding"):
        unpack_base3(padded, 12)


@pytest.mark.parametrize("packing", ["2bit", "base3"])
def test_wrong_shapes_and_dtypes_are_refused(packing: str) -> None:
    with pytest.raises(CheckpointError, match="int8 matrix"):
        pack(torch.zeros(2, 3), packing)
    with pytest.raises(CheckpointError, match="int8 matrix"):
        pack(torch.zeros(3, dtype=torch.int8), packing)
    with pytest.raises(CheckpointError, match="found 2"):
        pack(torch.full((2, 3), 2, dtype=torch.int8), packing)
    with pytest.raises(CheckpointError, match="must be uint8"):
        unpack(torch.zeros(2, 7, dtype=torch.uint8), 300, packing)
    with pytest.raises(CheckpointError, match="must be uint8"):
        unpack(torch.zeros(2, packed_width(10, packing), dtype=torch.int8), 10, packing)
    with pytest.raises(CheckpointError, match="at least 1"):
        unpack(torch.zeros(2, 0, dtype=torch.uint8), 0, packing)


def test_the_worked_examples_of_the_specification() -> None:
    trits = torch.zeros(1, 130, dtype=torch.int8)
    for k, value in {0: 1, 1: -1, 32: -1, 96: 1, 128: -1}.items():
        trits[0, k] = value
    packed = pack_2bit(trits)[0].tolist()
    assert {i: v for i, v in enumerate(packed) if v} == {0: 0x4D, 1: 0x03, 32: 0x03}
    assert len(packed) == 64
    assert pack_base3(torch.tensor([[1, 0, -1, -1, 1, 1, 0]], dtype=torch.int8)).tolist() == [[167, 122]]


def test_the_digest_of_the_specification_from_its_definition_alone() -> None:
    """Hashes written out by hand here, so that neither the code nor the text can drift."""
    import hashlib

    from tritflow.formats.integrity import Digest

    weight = b"a.weight\nU8\n1,32\n" + bytes([0b01, 0, 0b11]) + bytes(29)
    scale = b"a.weight_scale\nBF16\n1\n" + bytes([0x00, 0x3F])
    total = sum(int.from_bytes(hashlib.sha256(text).digest(), "big") for text in (weight, scale)) % 2**256
    digest = Digest()
    digest.add("a.weight_scale", torch.tensor([0.5], dtype=torch.bfloat16))
    digest.add("a.weight", pack_2bit(torch.tensor([[1, 0, -1]], dtype=torch.int8)))
    assert digest.hexdigest() == f"{total:064x}"
    assert digest.hexdigest() == "46f79c30a54404e0cc725ff472828b2dd87b5996d0a085e4ce4e4d50e4993445"
