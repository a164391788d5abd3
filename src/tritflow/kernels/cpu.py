"""The fast CPU path: oneDNN through PyTorch, nothing to compile, no weight unpacked or dequantized per call.

A packed weight is expanded once, into the form that the machine multiplies fastest, and the expansion belongs to
the weight: it is kept on the parameter (`Expansion`), one form at a time, and rebuilt when the bytes or scales
behind it change (in-place writes, `load_state_dict`) or the mode does. Moving a module drops it. Bytes a weight
beside the packed .25: W2A16 the activations' dtype (2 for bf16), W2A8 1. A weight that carries no `Expansion` is
expanded for each call and nothing stays, which costs time instead of memory.

W2A8: small weights go through `torch._int_mm` (lowest overhead), large ones through oneDNN's prepacked
`qlinear` in row chunks, whose temporaries stay in cache. Both sums are exact integers, as the reference's.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritflow.kernels import reference
from tritflow.kernels.backends import Backend, Kernel
from tritflow.kernels.reference import AMAX_FLOOR

EXPANSION = "_tritflow_expansion"
"""Attribute of a packed weight that owns its expanded form."""

_CHUNK = 256  # rows a qlinear call: enough for its blocking, and 4 * N bytes a row stay near the cores
_QUANTIZE_CHUNK = 64  # rows whose float temporaries fit the second-level cache
_QLINEAR_FROM = 1 << 20  # weights from this many trits on are prepacked

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
    """Whether int8 x int8 is as fast as uint8 x int8 (AMX); before that, x86 multiplies unsigned by signed."""
    probe = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return platform.machine() not in ("x86_64", "AMD64") or bool(probe and probe())


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
    if not torch.backends.mkldnn.is_available():
        return False  # without oneDNN it is a naive loop
    if _signed():
        return _exact(lambda q, t: torch._int_mm(q.view(torch.int8), t.t()) + 256 * _high(q, t))
    return _exact(lambda q, t: torch._int_mm(q, t.t()))


def _high(q: Tensor, t: Tensor) -> Tensor:
    """What reading uint8 as int8 loses: 256 for each value from 128 on."""
    return ((q >= 128).double() @ t.double().t()).to(torch.int32)


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


class _Int8:
    """A weight of int8 trits, its scales in float32, and the function from 8-bit rows to scaled rows."""

    def __init__(self, weight: Tensor, weight_scale: Tensor, input_scale: Tensor | None, in_features: int) -> None:
        trits = reference.trits(weight, in_features)
        self.scale = weight_scale.detach().float()
        self.input_scale = None if input_scale is None else input_scale.detach().float()
        self.prepacked = trits.numel() >= _QLINEAR_FROM and _has_qlinear()
        self.unsigned = self.prepacked or not _signed()
        self.bytes = trits.nbytes
        if self.prepacked:
            self.zeros = torch.zeros(trits.shape[0], dtype=torch.int64)
            self.trits = _ql.qlinear_prepack(trits, [_CHUNK, in_features])
        else:
            self.trits = trits.t()
            # What 128 added to every activation adds to a sum; float32 holds it exactly.
            self.offset = trits.sum(1).float() * 128 if self.unsigned else None

    def product(self, q: Tensor) -> Tensor:
        """Exact sums of 8-bit rows (raised by 128 if `unsigned`) times the row scales, float32."""
        if self.prepacked:
            return _qlinear(q, 128, self.trits, self.scale, self.zeros)
        sums = torch._int_mm(q, self.trits)
        return sums * self.scale if self.offset is None else torch.sub(sums, self.offset).mul_(self.scale)


def _quantize(x: Tensor, input_scale: Tensor | None, unsigned: bool) -> tuple[Tensor, Tensor]:
    """As the reference, bit for bit, in row chunks: 8-bit [M, K] (raised by 128 if `unsigned`), scale [M, 1]."""
    tokens = x.shape[0]
    if tokens <= _QUANTIZE_CHUNK or x.numel() < 1 << 18:
        q, scale = _quantize_rows(x, input_scale)
    else:
        q = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty((tokens, 1))
        for start in range(0, tokens, _QUANTIZE_CHUNK):
            part = slice(start, start + _QUANTIZE_CHUNK)
            q[part], scale[part] = _quantize_rows(x[part], input_scale)
    # Adding 128 wraps in a byte as it should: int8 -127..127 becomes uint8 1..255.
    return (q.view(torch.uint8).add_(128) if unsigned else q), scale


def _quantize_rows(x: Tensor, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    rows = x.float()
    if input_scale is not None:
        rows = rows * input_scale
    work = rows.abs()
    amax = work.amax(dim=-1, keepdim=True).clamp_min_(AMAX_FLOOR)
    q = torch.mul(rows, torch.div(_Q127, amax), out=work).round_().to(torch.int8)
    return q, amax.div_(127.0)


_Q127 = torch.tensor(127.0)


def quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """`reference.quantize_activation` for int8, bit for bit, without temporaries of the whole size."""
    columns = None if input_scale is None else input_scale.float()
    q, scale = _quantize(x.reshape(-1, x.shape[-1]), columns, False)
    return q, scale.squeeze(-1)


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

    def build() -> tuple[_Int8, int]:
        form = _Int8(weight, weight_scale, input_scale, x.shape[-1])
        return form, form.bytes

    key = ("int8", _stamp(weight), _stamp(weight_scale), _stamp(input_scale))
    form: _Int8 = _expanded(weight, key, build)
    rows = x.reshape(-1, x.shape[-1])
    if bias is not None and bias.dtype != torch.float32:
        bias = bias.float()
    tokens, features = rows.shape[0], form.scale.shape[0]
    shape = (*x.shape[:-1], features)
    if tokens <= _CHUNK or not form.prepacked:
        return _rows(rows, form, bias).to(x.dtype).view(shape)
    out = torch.empty((tokens, features), dtype=x.dtype)
    for start in range(0, tokens, _CHUNK):
        part = slice(start, start + _CHUNK)
        out[part] = _rows(rows[part], form, bias)
    return out.view(shape)


def _rows(rows: Tensor, form: _Int8, bias: Tensor | None) -> Tensor:
    q, scale = _quantize(rows, form.input_scale, form.unsigned)
    sums = form.product(q)
    return sums.mul_(scale) if bias is None else torch.addcmul(bias, sums, scale, out=sums)


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
    },
)
