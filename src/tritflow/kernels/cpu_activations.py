"""Activations to 8 bits a row on the CPU: the reference's integers, in as few passes over memory as PyTorch allows."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from tritflow.kernels.expansion import stamp
from tritflow.kernels.reference import AMAX_FLOOR

_QUANTIZE_CHUNK = 1 << 17  # activations a thread whose float temporaries fit the second-level cache
_Q127 = torch.tensor(127.0)
_ROUNDER = 1.5 * 2.0**23


def quantize_rows(x: Tensor, input_scale: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    """The reference's integers (raised by 128 if `unsigned`) and each row's largest magnitude [M, 1].

    Rows of zeros divide by zero: the NaN that this makes has a lowest byte of 0, and is multiplied by the
    magnitude 0 later. A NaN or infinity in a row stays in its magnitude.
    """
    rows = x.float()
    if input_scale is not None:
        rows = rows * input_scale
    work = rows.abs()
    amax = work.amax(dim=-1, keepdim=True)
    scaled = torch.mul(rows, torch.div(_Q127, amax), out=work)
    # One addition rounds to integers, ties to even, and leaves them in the lowest byte of the float.
    # (A fused multiply-add would save a pass and round a few in a million differently.)
    bits = scaled.add_(_ROUNDER + 128.0 if unsigned else _ROUNDER).view(torch.int32)
    return bits.to(torch.uint8 if unsigned else torch.int8), amax


def quantize(x: Tensor, input_scale: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in chunks whose float temporaries stay in cache, and are the same memory for every chunk."""
    tokens, width = x.shape
    step = max(16, _QUANTIZE_CHUNK * torch.get_num_threads() // width)
    if tokens <= step or x.numel() < 2 * _QUANTIZE_CHUNK:
        return quantize_rows(x, input_scale, unsigned)
    q = torch.empty(x.shape, dtype=torch.uint8 if unsigned else torch.int8)
    amax, floats = torch.empty((tokens, 1)), torch.empty((step, width))
    # Without its sign bit a 16-bit float orders like an integer (NaN above all): half the bytes for the maximum.
    bits = x.view(torch.int16) if x.element_size() == 2 and input_scale is None else None
    work = torch.empty((step, width), dtype=torch.float32 if bits is None else torch.int16)
    for start in range(0, tokens, step):
        part = slice(start, min(start + step, tokens))
        count = part.stop - start
        rows, scratch, largest = floats[:count], work[:count], amax[part]
        if input_scale is None:
            rows.copy_(x[part])
        else:
            torch.mul(rows.copy_(x[part]), input_scale, out=rows)
        if bits is None:
            torch.amax(torch.abs(rows, out=scratch), dim=-1, keepdim=True, out=largest)
        else:
            magnitudes = torch.bitwise_and(bits[part], 0x7FFF, out=scratch)
            largest.copy_(magnitudes.amax(dim=-1, keepdim=True).view(x.dtype))
        rows.mul_(torch.div(_Q127, largest)).add_(_ROUNDER + 128.0 if unsigned else _ROUNDER)
        q[part].copy_(rows.view(torch.int32))
    return q, amax


class Last:
    """The last quantized activation: query, key and value projections read the same tensor one after the other.

    It is recognised by identity and version, so a write in place is seen, and forgotten when the tensor dies.
    """

    def __init__(self) -> None:
        self.entry: tuple[Any, ...] | None = None

    def quantize(self, x: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
        """`quantize` of x [..., K] as rows [M, K], or what it gave for this very tensor just before."""
        entry = self.entry
        seen = stamp(x)
        if entry is not None and entry[0]() is x and entry[1] == seen and entry[2] == unsigned:
            q, amax = entry[3:]
            return q, amax
        q, amax = quantize(x.reshape(-1, x.shape[-1]), None, unsigned)
        if not x.is_inference():
            self.entry = (weakref.ref(x, self._forget), seen, unsigned, q, amax)
        return q, amax

    def _forget(self, dead: Any) -> None:
        entry = self.entry
        if entry is not None and entry[0] is dead:
            self.entry = None


last = Last()


def quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """`reference.quantize_activation` for int8, bit for bit, without temporaries of the whole size."""
    columns = None if input_scale is None else input_scale.float()
    q, amax = quantize(x.reshape(-1, x.shape[-1]), columns, False)
    return q, amax.clamp_min_(AMAX_FLOOR).div_(127.0).squeeze(-1)


def supports_quantize(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> bool:
    return dtype == "int8" and x.numel() > 0
