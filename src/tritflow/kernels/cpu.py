"""The fast CPU path: oneDNN through PyTorch, nothing to compile, no weight unpacked or dequantized per call.

A packed weight is expanded once, into the form that the machine multiplies fastest, and the expansion belongs to
the weight: it is kept on the parameter (`Expansion`), one form at a time, and rebuilt when the bytes or scales
behind it change (in-place writes, `load_state_dict`) or the mode does. Moving a module drops it. Bytes a weight
beside the packed .25: W2A16 the activations' dtype (2 for bf16), W2A8 1. A weight that carries no `Expansion` is
expanded for each call and nothing stays, which costs time instead of memory.

W2A8: small products go through `torch._int_mm` (lowest overhead), others through oneDNN's prepacked `qlinear`, which
scales its sums before they leave the registers; large ones in blocks whose results stay in cache meanwhile. Both sums
are exact integers.
"""

from __future__ import annotations

import platform
import weakref
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritflow.kernels import reference
from tritflow.kernels.backends import Backend, Kernel
from tritflow.kernels.reference import AMAX_FLOOR

EXPANSION = "_tritflow_expansion"
"""Attribute of a packed weight that owns its expanded form."""

_ROWS, _COLUMNS = 1024, 1536  # of a product of qlinear: enough for its blocking, and a result that stays in cache
_QUANTIZE_CHUNK = 1 << 17  # activations a thread whose float temporaries fit the second-level cache
_QLINEAR_FROM = 1 << 20  # weights from this many trits on are prepacked,
_QLINEAR_RESULT = 1 << 14  # and smaller ones once a result has this many elements
_RESULT_CHUNK = 1 << 19  # elements of a smaller weight's result in one go: more would be fresh pages at every call

_ql: Any = torch.ops.onednn
_mkldnn: Any = torch.ops.mkldnn


class Expansion:
    """The expanded form of one packed weight: at most one at a time, rebuilt when its key changes."""

    __slots__ = ("bytes", "form", "key")

    def __init__(self) -> None:
        self.key: Hashable = None
        self.form: Any = None
        self.bytes = 0
        """Resident bytes of the form (0: none yet). oneDNN may pad its own layouts a little beyond this."""

    def drop(self) -> None:
        """Free the form; the next call builds it again."""
        self.key, self.form, self.bytes = None, None, 0


def _stamp(tensor: Tensor | None) -> Hashable:
    """Changes whenever the tensor's data may have: another storage, or a write in place."""
    if tensor is None:
        return None
    return tensor.data_ptr(), (0 if tensor.is_inference() else tensor._version)


def _expanded(weight: Tensor, key: Hashable, build: Callable[[], tuple[Any, int]]) -> Any:
    expansion: Expansion | None = getattr(weight, EXPANSION, None)
    if expansion is None:
        return build()[0]
    if expansion.key != key:
        expansion.form, expansion.bytes = build()
        expansion.key = key
    return expansion.form


# --- what this machine has ------------------------------------------------------------------------------------


@cache
def _signed() -> bool:
    """Whether `torch._int_mm` is to be fed int8: with AMX as fast as uint8; else x86 multiplies unsigned by signed."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    if platform.machine() not in ("x86_64", "AMD64") or (probe is not None and probe()):
        return True
    return not _takes_unsigned()


@cache
def _takes_unsigned() -> bool:
    """PyTorch up to 2.11 refuses uint8 here."""
    return _exact(lambda q, t: torch._int_mm(q, t.t()))


def _exact(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether a product of uint8 [M, K] and int8 [N, K] runs here and is exact on the largest values."""
    q = torch.tensor([[255, 0, 1, 128] * 16, [255] * 64, [7, 250, 3, 9] * 16], dtype=torch.uint8)
    t = torch.tensor([[1] * 64, [-1] * 64, [1, -1, 0, 1] * 16] * 16, dtype=torch.int8)
    try:
        return torch.equal(product(q, t).double(), q.double() @ t.double().t())
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


@cache
def _has_int_mm() -> bool:
    """Whether `torch._int_mm` is oneDNN's and exact; without oneDNN it is a naive loop."""
    if not torch.backends.mkldnn.is_available():
        return False
    return _exact(lambda q, t: torch._int_mm((q.int() - 128).to(torch.int8), t.t()) + 128 * t.sum(1).int())


@cache
def _has_qlinear() -> bool:
    def product(q: Tensor, t: Tensor) -> Tensor:
        ones, zeros = torch.ones(t.shape[0]), torch.zeros(t.shape[0], dtype=torch.int64)
        return _qlinear(q, 0, _ql.qlinear_prepack(t, list(q.shape)), ones, zeros)

    return torch.backends.mkldnn.is_available() and _exact(product)


@cache
def _has_packed_bf16() -> bool:
    try:
        if not (torch.backends.mkldnn.is_available() and _mkldnn._is_mkldnn_bf16_supported()):
            return False
        x, w = torch.eye(16, dtype=torch.bfloat16), torch.arange(256, dtype=torch.bfloat16).view(16, 16)
        packed = _mkldnn._reorder_linear_weight(w, 16)
        return torch.equal(_mkldnn._linear_pointwise(x, packed, None, "none", [], ""), w.t())
    except (RuntimeError, AttributeError, TypeError, NotImplementedError):
        return False


# --- W2A16 ----------------------------------------------------------------------------------------------------


def _dense(weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, x: Tensor) -> Any:
    """The dequantized weight in x.dtype, in oneDNN's layout where that helps; (packed, tensor)."""

    def build() -> tuple[Any, int]:
        dense = reference.dequantize(weight, x.shape[-1], weight_scale, input_scale, x.dtype)
        if x.dtype == torch.bfloat16 and _has_packed_bf16():
            tokens = max(1, x.numel() // x.shape[-1])
            return (True, _mkldnn._reorder_linear_weight(dense, tokens)), dense.nbytes
        return (False, dense), dense.nbytes

    key = ("dense", x.dtype, _stamp(weight), _stamp(weight_scale), _stamp(input_scale))
    return _expanded(weight, key, build)


def w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """`F.linear` on the expanded weight: exact in bf16 without `input_scale`, rounded like any bf16 weight with it."""
    packed, dense = _dense(weight, weight_scale, input_scale, x)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if not packed:
        return F.linear(x, dense, bias)
    out: Tensor = _mkldnn._linear_pointwise(x.contiguous(), dense, bias, "none", [], "")
    return out


def _supports_w2a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> bool:
    return x.numel() > 0


# --- W2A8 -----------------------------------------------------------------------------------------------------


def _qlinear(q: Tensor, zero_point: int, packed: Tensor, scale: Tensor, zeros: Tensor) -> Tensor:
    """(q - zero_point) @ T^T * scale[n], float32."""
    out: Tensor = _ql.qlinear_pointwise(
        q, 1.0, zero_point, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


class _Block(NamedTuple):
    """Some rows of a weight as int8 trits, in the layout of their product."""

    columns: slice  # of the result
    trits: Tensor
    scale: Tensor  # weight_scale / 127: the activations' 127 is divided out once a weight instead of once a call
    extra: Tensor | None  # qlinear's zero points, or what unsigned activations add to a sum of `_int_mm`


class _Int8:
    """The expanded form of W2A8: int8 trits in blocks, and what the product needs beside them.

    `large` says that results are large, so that even a small weight is worth prepacking.
    """

    def __init__(
        self, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, in_features: int, large: bool = False
    ) -> None:
        trits = reference.trits(weight, in_features)
        scale = (weight_scale.detach().double() / 127.0).float()
        self.input_scale = None if input_scale is None else input_scale.detach().float()
        self.bytes, self.out_features = trits.nbytes, trits.shape[0]
        self.prepacked = (large or trits.numel() >= _QLINEAR_FROM) and _has_qlinear()
        self.rows = _ROWS if trits.numel() >= _QLINEAR_FROM else max(1, _RESULT_CHUNK // max(1, len(trits)))
        self.unsigned = self.prepacked or not _signed()
        if not self.prepacked:
            # What 128 added to every activation adds to a sum; float32 holds it exactly.
            offset = trits.sum(1).float() * 128 if self.unsigned else None
            self.blocks = [_Block(slice(0, len(trits)), trits.t(), scale, offset)]
            return
        self.blocks = []
        step = -(-len(trits) // -(-len(trits) // _COLUMNS))
        for start in range(0, len(trits), step):
            part = slice(start, min(start + step, len(trits)))
            packed = _ql.qlinear_prepack(trits[part].contiguous(), [_ROWS, in_features])
            zeros = torch.zeros(part.stop - start, dtype=torch.int64)
            self.blocks.append(_Block(part, packed, scale[part].clone(), zeros))

    def product(self, q: Tensor, block: _Block) -> Tensor:
        """Exact sums of 8-bit rows (raised by 128 if `unsigned`) times weight_scale / 127, float32."""
        _, trits, scale, extra = block
        if self.prepacked:
            assert extra is not None
            return _qlinear(q, 128, trits, scale, extra)
        sums = torch._int_mm(q, trits)
        return sums * scale if extra is None else torch.sub(sums, extra).mul_(scale)


_Q127 = torch.tensor(127.0)
_ROUNDER = 1.5 * 2.0**23


def _quantize_rows(x: Tensor, input_scale: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
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


def _quantize(x: Tensor, input_scale: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    """`_quantize_rows` in chunks whose float temporaries stay in cache, and are the same memory for every chunk."""
    tokens, width = x.shape
    step = max(16, _QUANTIZE_CHUNK * torch.get_num_threads() // width)
    if tokens <= step or x.numel() < 2 * _QUANTIZE_CHUNK:
        return _quantize_rows(x, input_scale, unsigned)
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


class _Last:
    """The last quantized activation: query, key and value projections read the same tensor one after the other.

    It is recognised by identity and version, so a write in place is seen, and forgotten when the tensor dies.
    """

    def __init__(self) -> None:
        self.entry: tuple[Any, ...] | None = None

    def quantize(self, x: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
        entry = self.entry
        stamp = _stamp(x)
        if entry is not None and entry[0]() is x and entry[1] == stamp and entry[2] == unsigned:
            q, amax = entry[3:]
            return q, amax
        q, amax = _quantize(x.reshape(-1, x.shape[-1]), None, unsigned)
        if not x.is_inference():
            self.entry = (weakref.ref(x, self._forget), stamp, unsigned, q, amax)
        return q, amax

    def _forget(self, dead: Any) -> None:
        entry = self.entry
        if entry is not None and entry[0] is dead:
            self.entry = None


_last = _Last()


def quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """`reference.quantize_activation` for int8, bit for bit, without temporaries of the whole size."""
    columns = None if input_scale is None else input_scale.float()
    q, amax = _quantize(x.reshape(-1, x.shape[-1]), columns, False)
    return q, amax.clamp_min_(AMAX_FLOOR).div_(127.0).squeeze(-1)


def _supports_quantize(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> bool:
    return dtype == "int8" and x.numel() > 0


def w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> Tensor:
    """Exact int8 sums on expanded trits; scales and bias in float32, one rounding to x.dtype."""

    large = x.numel() // x.shape[-1] * weight_scale.shape[0] >= _QLINEAR_RESULT

    def build() -> tuple[_Int8, int]:
        form = _Int8(weight, weight_scale, input_scale, x.shape[-1], large)
        return form, form.bytes

    key = ("int8", _stamp(weight), _stamp(weight_scale), _stamp(input_scale))
    form: _Int8 = _expanded(weight, key, build)
    if large and not form.prepacked and _has_qlinear():
        # Once prepacked it stays so: batches of different sizes in turn shall not expand a weight again and again.
        getattr(weight, EXPANSION).drop()
        form = _expanded(weight, key, build)
    if form.input_scale is None:
        q, amax = _last.quantize(x, form.unsigned)
    else:
        q, amax = _quantize(x.reshape(-1, x.shape[-1]), form.input_scale, form.unsigned)
    out = _products(form, q, amax, bias, x.dtype)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], form.out_features)


def _products(form: _Int8, q: Tensor, amax: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[M, N] from rows as `form` wants them (signed or raised by 128) and their largest magnitudes [M, 1]."""
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    tokens = q.shape[0]
    if len(form.blocks) == 1 and (tokens <= form.rows or not form.prepacked):
        return _scaled(form.product(q, form.blocks[0]), amax, bias).to(dtype)
    out = torch.empty((tokens, form.out_features), dtype=dtype)
    for block in form.blocks:
        offset = None if bias is None else bias[block.columns]
        for start in range(0, tokens, form.rows):
            part = slice(start, start + form.rows)
            out[part, block.columns] = _scaled(form.product(q[part], block), amax[part], offset)
    return out


def w2a8_matmul(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    low: Tensor | None = None,
    up: Tensor | None = None,
) -> Tensor:
    """`w2a8_linear` on int8 activations that are quantized already; what is added to it in passes of their own."""

    def build() -> tuple[_Int8, int]:
        form = _Int8(weight, weight_scale, None, q.shape[-1], True)
        return form, form.bytes

    key = ("int8 matmul", _stamp(weight), _stamp(weight_scale))
    form: _Int8 = _expanded(weight, key, build)
    rows = (q.view(torch.uint8) ^ 128) if form.unsigned else q
    # The form holds weight_scale / 127, because w2a8_linear multiplies with a row's largest magnitude.
    out = _products(form, rows, x_scale[:, None] * 127.0, bias, dtype)
    if low is not None and up is not None:
        reference.low_rank_add_(out, low, up)
    if residual is None or gate is None:
        return out
    return reference.gated_residual(residual, gate, out.view(residual.shape)).flatten(0, 1)


def _supports_matmul(q: Tensor, *args: Any) -> bool:
    return q.dtype == torch.int8 and q.numel() > 0 and _has_int_mm()


def _scaled(sums: Tensor, amax: Tensor, bias: Tensor | None) -> Tensor:
    return sums.mul_(amax) if bias is None else torch.addcmul(bias, sums, amax, out=sums)


def _supports_w2a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> bool:
    return activation_dtype == "int8" and x.numel() > 0 and _has_int_mm()


BACKEND = Backend(
    name="cpu",
    device_types=("cpu",),
    why_not=lambda device: None,
    kernels={
        "quantize_activation": Kernel(quantize_activation, _supports_quantize),
        "w2a16_linear": Kernel(w2a16_linear, _supports_w2a16),
        "w2a8_linear": Kernel(w2a8_linear, _supports_w2a8),
        "w2a8_matmul": Kernel(w2a8_matmul, _supports_matmul),
        "w2a16_low_rank": Kernel(
            reference.in_two_passes(w2a16_linear, reference.low_rank_add_), lambda *args: _supports_w2a16(*args[:-2])
        ),
    },
)
