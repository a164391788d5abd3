"""Two bits to a number of the matrix unit, shared by the Triton products."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(packed, BITS: tl.constexpr, PACKED_ASM: tl.constexpr):
    """uint8 [N, 32], one 128-K block of rows, to unsigned integers [N, 128] of BITS bits in K order.

    Code 01 becomes 0x40.., code 11 0xC0.., code 00 zero: +-64 as int8, +-2.0 as e4m3, fp16, bf16 and fp32. The caller
    takes the factor back in its epilogue. PACKED_ASM is kept for decoding four bytes at once in assembly, which
    the interpreter cannot run; it must give the same bits.
    """
    tl.static_assert(not PACKED_ASM, "only the pure-operation decode exists")
    if BITS == 8:
        wide = packed
    elif BITS == 16:
        wide = packed.to(tl.uint16)
    else:
        wide = packed.to(tl.uint32)
    top: tl.constexpr = BITS - 2
    mask: tl.constexpr = 3 << top
    f0 = (wide << top) & mask
    f1 = (wide << (top - 2)) & mask
    f2 = (wide << (top - 4)) & mask
    f3 = (wide << (top - 6)) & mask
    # [N, j, field & 1, field >> 1] to [N, field >> 1, field & 1, j]: k = 32 * field + j.
    fields = tl.join(tl.join(f0, f1), tl.join(f2, f3))
    return tl.reshape(tl.permute(fields, (0, 3, 2, 1)), (packed.shape[0], 128))
