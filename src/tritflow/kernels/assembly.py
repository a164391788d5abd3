"""PTX that Triton and Gluon kernels share; plain text, so that neither compiler has to be importable."""

from __future__ import annotations

HALVES = """
    {
    .reg .b32 a, b, t<6>;
    prmt.b32 a, $8, 0, 0x1404;
    prmt.b32 b, $8, 0, 0x3424;
    shl.b32 t0, a, 6;
    shl.b32 t1, b, 6;
    shl.b32 t2, a, 4;
    shl.b32 t3, b, 4;
    shl.b32 t4, a, 2;
    shl.b32 t5, b, 2;
    and.b32 $0, t0, 0xC000C000;
    and.b32 $1, t1, 0xC000C000;
    and.b32 $2, t2, 0xC000C000;
    and.b32 $3, t3, 0xC000C000;
    and.b32 $4, t4, 0xC000C000;
    and.b32 $5, t5, 0xC000C000;
    and.b32 $6, a, 0xC000C000;
    and.b32 $7, b, 0xC000C000;
    }
    """
"""Sixteen trits of a 32-bit word as eight pairs of bf16 or fp16 in {0, +-2}: bytes (0, 1) and (2, 3) go to the upper
halves of two 16-bit numbers each, then each field's two bits to the top of them."""
