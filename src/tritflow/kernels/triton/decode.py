"""Two bits to a number of the matrix unit, shared by the Triton products."""

from __future__ import annotations

import triton
import triton.language as tl

from tritflow.kernels.assembly import HALVES

# Four bytes at once; bits that a shift carries into the next byte are masked away.
_BYTES = tl.constexpr(
    """
    {
    .reg .b32 t<3>;
    shl.b32 t0, $4, 6;
    shl.b32 t1, $4, 4;
    shl.b32 t2, $4, 2;
    and.b32 $0, t0, 0xC0C0C0C0;
    and.b32 $1, t1, 0xC0C0C0C0;
    and.b32 $2, t2, 0xC0C0C0C0;
    and.b32 $3, $4, 0xC0C0C0C0;
    }
    """
)
_HALVES = tl.constexpr(HALVES)


@triton.jit
def decode(packed, BITS: tl.constexpr, PACKED_ASM: tl.constexpr):
    """uint8 [N, 32], one 128-K block of rows, to unsigned integers [N, 128] of BITS bits in K order.

    Code 01 becomes 0x40.., code 11 0xC0.., code 00 zero: +-64 as int8, +-2.0 as e4m3, fp16, bf16 and fp32. The caller
    takes the factor back in its epilogue. PACKED_ASM decodes four bytes at once in NVIDIA's assembly (8 and 16 bits),
    which the interpreter cannot run; it gives the same bits.
    """
    if PACKED_ASM and BITS == 8:
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            _BYTES, "=r,=r,=r,=r,r", [packed], dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    elif PACKED_ASM and BITS == 16:
        f0, f1, f2, f3 = tl.inline_asm_elementwise(
            _HALVES,
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.uint16, tl.uint16, tl.uint16, tl.uint16),
            is_pure=True,
            pack=4,
        )
    else:
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
