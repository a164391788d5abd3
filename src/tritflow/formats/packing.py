"""Trits to bytes and back: two bits a trit (disk, memory and GPU share this layout), or five trits a byte.

README.md in this folder is the specification; this file is its reference implementation. Everything is
vectorised and runs on the tensor's device, a slab of rows at a time, so that temporaries stay small however
large the layer is.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from tritflow.config import Packing
from tritflow.formats.errors import CheckpointError

BLOCK = 128
"""Trits in a 2-bit block; a row is padded with the trit 0 to a multiple of this."""
BLOCK_BYTES = BLOCK // 4
FIELD = BLOCK // 4
"""Distance in K between two neighbouring 2-bit fields of one byte."""
TRITS_PER_BYTE = 5
"""Of base 3: 3^5 = 243 <= 256."""

_SLAB = 1 << 22  # trits handled at once: temporaries of a few MiB
_SLAB_ELSEWHERE = 1 << 24  # on a GPU, where every slab costs some twenty launches
_WORDS = 1 << 15  # of eight bytes, checked at once by NumPy: they and a temporary fit in a core's cache
_LOW = 0x5555555555555555  # the low bit of every code in eight bytes


def packed_width(in_features: int, packing: Packing = "2bit") -> int:
    """Bytes of one packed row of `in_features` trits."""
    if packing == "2bit":
        return BLOCK_BYTES * -(-in_features // BLOCK)
    return -(-in_features // TRITS_PER_BYTE)


def _slabs(tensor: Tensor, columns: int) -> Iterator[slice]:
    rows = tensor.shape[0]
    step = max(1, (_SLAB if tensor.device.type == "cpu" else _SLAB_ELSEWHERE) // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def _require_trits(trits: Tensor) -> None:
    if trits.dtype != torch.int8 or trits.ndim != 2 or trits.shape[1] == 0:
        raise CheckpointError(
            f"trits must be an int8 matrix [out_features, in_features], not {_describe(trits)}; "
            "ternarize the weight first"
        )


def _require_trit_values(slab: Tensor) -> None:
    if slab.numel() and bool(((slab < -1) | (slab > 1)).any()):
        bad = int(slab[(slab < -1) | (slab > 1)][0])
        raise CheckpointError(f"trits must be -1, 0 or 1, found {bad}")


def _require_packed(packed: Tensor, in_features: int, packing: Packing) -> None:
    if in_features < 1:
        raise CheckpointError(f"in_features must be at least 1, not {in_features}")
    width = packed_width(in_features, packing)
    if packed.dtype != torch.uint8 or packed.ndim != 2 or packed.shape[1] != width:
        raise CheckpointError(
            f"a {packing} weight of {in_features} input features must be uint8 [out_features, {width}], "
            f"not {_describe(packed)}"
        )


def _describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def pack_2bit(trits: Tensor) -> Tensor:
    """Pack trits as two's-complement 2-bit codes (0: 00, +1: 01, -1: 11; 10 never occurs).

    A row is padded with 0 to blocks of 128. In block b, bits 2f and 2f+1 of byte j (0..31) hold
    k = 128 b + 32 f + j, so that `(byte << (6 - 2 f)) & 0xC0` read as int8 is 0, +64 or -64.

    Args:
        trits: int8 [N, K] of -1, 0, 1, on any device.

    Returns:
        uint8 [N, 32 * ceil(K / 128)].

    Raises:
        CheckpointError: not an int8 matrix, or a value outside -1..1.
    """
    _require_trits(trits)
    rows, in_features = trits.shape
    width = packed_width(in_features)
    out = torch.empty((rows, width), dtype=torch.uint8, device=trits.device)
    for slab in _slabs(trits, in_features):
        part = trits[slab]
        _require_trit_values(part)
        part = torch.nn.functional.pad(part, (0, width * 4 - in_features))
        codes = part.contiguous().view(torch.uint8).view(part.shape[0], -1, 4, FIELD) & 3
        packed = codes[:, :, 0].clone()
        for field in range(1, 4):
            packed |= codes[:, :, field] << (2 * field)
        out[slab] = packed.flatten(1)
    return out


def unpack_2bit(packed: Tensor, in_features: int, *, check: bool = True) -> Tensor:
    """The inverse of `pack_2bit`.

    Args:
        packed: uint8 [N, 32 * ceil(in_features / 128)].
        in_features: K, the number of trits of a row that count.
        check: refuse the code 10 and nonzero padding. Switch it off only for bytes that were checked before:
            it reads the data, so it would synchronise a GPU.

    Returns:
        int8 [N, K].

    Raises:
        CheckpointError: wrong dtype or shape, an invalid code, or nonzero padding.
    """
    _require_packed(packed, in_features, "2bit")
    rows = packed.shape[0]
    out = torch.empty((rows, in_features), dtype=torch.int8, device=packed.device)
    for slab in _slabs(packed, in_features):
        part = packed[slab]
        if check:
            _check_2bit(part, in_features, slab.start)
        blocks = part.reshape(part.shape[0], -1, 1, FIELD)
        # Left shift drops the fields above; the arithmetic right shift extends the sign.
        fields = [(blocks << (6 - 2 * f)).view(torch.int8) >> 6 for f in range(4)]
        out[slab] = torch.cat(fields, dim=2).flatten(1)[:, :in_features]
    return out


def check_2bit(packed: Tensor, in_features: int) -> None:
    """Raise `CheckpointError` unless `packed` is exactly what `pack_2bit` can write; allocates no trits."""
    _require_packed(packed, in_features, "2bit")
    for slab in _slabs(packed, in_features):
        _check_2bit(packed[slab], in_features, slab.start)


def check_packed(packed: Tensor, in_features: int, packing: Packing) -> None:
    """Raise `CheckpointError` unless `packed` is exactly what packing some trits would give."""
    if packing == "2bit":
        check_2bit(packed, in_features)
        return
    _require_packed(packed, in_features, packing)
    for slab in _slabs(packed, in_features):
        _check_base3(packed[slab], in_features, slab.start)


def _has_invalid(part: Tensor) -> bool:
    """Whether a byte holds the code 10, whose high bit stands alone; eight bytes at a time.

    On a CPU by NumPy: PyTorch is slow at single bytes, and starts all its threads for every small operation, which wait
    for each other where other processes compute, too. NumPy lets go of the interpreter's lock, so threads may share
    the work.
    """
    if part.device.type != "cpu":
        whole = part.clone() if part.storage_offset() % 8 else part.contiguous()
        word = whole.view(torch.int64)
        return bool(((word >> 1) & ~word & _LOW).any())
    words = part.contiguous().numpy().reshape(-1).view(np.uint64)
    with_high = np.empty(min(_WORDS, words.size), np.uint64)
    for start in range(0, words.size, _WORDS):
        some = words[start : start + _WORDS]
        filled = with_high[: some.size]
        # Every high bit copied to its low bit changes nothing where codes are valid.
        np.right_shift(some, np.uint64(1), out=filled)
        np.bitwise_and(filled, np.uint64(_LOW), out=filled)
        np.bitwise_or(filled, some, out=filled)
        if not np.array_equal(filled, some):
            return True
    return False


def _check_2bit(part: Tensor, in_features: int, first_row: int) -> None:
    if _has_invalid(part):
        row = first_row + int(((part >> 1) & ~part & 0x55).any(dim=1).nonzero()[0])
        raise CheckpointError(f"row {row} holds the 2-bit code 10, which no trit has: the weight is damaged")
    tail = in_features % BLOCK
    if tail:
        mask = torch.zeros(FIELD, dtype=torch.uint8)
        for k in range(tail, BLOCK):
            mask[k % FIELD] |= 3 << (2 * (k // FIELD))
        if bool((part[:, -FIELD:] & mask.to(part.device)).any()):
            raise CheckpointError(f"nonzero padding after input feature {in_features}: the weight is damaged")


def pack_base3(trits: Tensor) -> Tensor:
    """Pack five trits a byte: `sum((t[5 j + i] + 1) * 3**i for i in range(5))`; padding is the trit 0.

    Args:
        trits: int8 [N, K] of -1, 0, 1, on any device.

    Returns:
        uint8 [N, ceil(K / 5)], every byte at most 242.

    Raises:
        CheckpointError: not an int8 matrix, or a value outside -1..1.
    """
    _require_trits(trits)
    rows, in_features = trits.shape
    width = packed_width(in_features, "base3")
    out = torch.empty((rows, width), dtype=torch.uint8, device=trits.device)
    for slab in _slabs(trits, in_features):
        part = trits[slab]
        _require_trit_values(part)
        part = torch.nn.functional.pad(part, (0, width * TRITS_PER_BYTE - in_features))
        digits = (part + 1).view(torch.uint8).view(part.shape[0], width, TRITS_PER_BYTE)
        packed = digits[:, :, 4].clone()
        for i in range(3, -1, -1):
            packed = packed * 3 + digits[:, :, i]
        out[slab] = packed
    return out


def unpack_base3(packed: Tensor, in_features: int, *, check: bool = True) -> Tensor:
    """The inverse of `pack_base3`.

    Args:
        packed: uint8 [N, ceil(in_features / 5)].
        in_features: K, the number of trits of a row that count.
        check: refuse bytes above 242 and padding other than the trit 0.

    Returns:
        int8 [N, K].

    Raises:
        CheckpointError: wrong dtype or shape, a byte above 242, or nonzero padding.
    """
    _require_packed(packed, in_features, "base3")
    rows, width = packed.shape
    out = torch.empty((rows, in_features), dtype=torch.int8, device=packed.device)
    table = _base3_table().to(packed.device)
    for slab in _slabs(packed, in_features):
        part = packed[slab]
        if check:
            _check_base3(part, in_features, slab.start)
        trits = table.index_select(0, part.reshape(-1).int()).view(part.shape[0], width * TRITS_PER_BYTE)
        out[slab] = trits[:, :in_features]
    return out


def _check_base3(part: Tensor, in_features: int, first_row: int) -> None:
    bad = part > 242
    if bool(bad.any()):
        raise CheckpointError(
            f"row {first_row + int(bad.any(dim=1).nonzero()[0])} holds the byte {int(part[bad][0])}; "
            "five trits reach 242 at most: the weight is damaged"
        )
    tail = in_features % TRITS_PER_BYTE
    if tail:
        # All padding digits are 1 (the trit 0), so the last byte without its own digits is a constant.
        padding = sum(3**i for i in range(tail, TRITS_PER_BYTE)) // 3**tail
        if bool((torch.div(part[:, -1], 3**tail, rounding_mode="floor") != padding).any()):
            raise CheckpointError(f"nonzero padding after input feature {in_features}: the weight is damaged")


def _base3_table() -> Tensor:
    # 256 rows, so that an unchecked byte above 242 cannot read out of bounds.
    byte = torch.arange(256)
    return torch.stack([byte // 3**i % 3 - 1 for i in range(TRITS_PER_BYTE)], dim=1).to(torch.int8)


def pack(trits: Tensor, packing: Packing) -> Tensor:
    """`pack_2bit` or `pack_base3`, by name."""
    return pack_2bit(trits) if packing == "2bit" else pack_base3(trits)


def unpack(packed: Tensor, in_features: int, packing: Packing, *, check: bool = True) -> Tensor:
    """`unpack_2bit` or `unpack_base3`, by name."""
    return (unpack_2bit if packing == "2bit" else unpack_base3)(packed, in_features, check=check)


def repack(packed: Tensor, in_features: int, source: Packing, target: Packing) -> Tensor:
    """Losslessly change the packing of a weight, checking it; at most a slab is unpacked at a time.

    Args:
        packed: uint8 [N, packed_width(in_features, source)].
        in_features: K.
        source: how `packed` lies now.
        target: how the result lies.

    Returns:
        uint8 [N, packed_width(in_features, target)].

    Raises:
        CheckpointError: `packed` is not valid in its packing.
    """
    _require_packed(packed, in_features, source)
    width = packed_width(in_features, target)
    out = torch.empty((packed.shape[0], width), dtype=torch.uint8, device=packed.device)
    for slab in _slabs(packed, in_features):
        out[slab] = pack(unpack(packed[slab], in_features, source), target)
    return out
