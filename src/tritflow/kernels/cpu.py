"""The fast CPU path: oneDNN through PyTorch, nothing to compile, no weight unpacked or dequantized per call.

A packed weight is expanded once, into the form that the machine multiplies fastest, and the expansion belongs to
the weight: it is kept on the parameter (`Expansion`), one form at a time, and rebuilt when the bytes or scales
behind it change (in-place writes, `load_state_dict`) or the mode does. Moving a module drops it. Bytes a weight
beside the packed .25: W2A16 the activations' dtype (2 for bf16), W2A8 1. A weight that carries no `Expansion` is
expanded for each call and nothing stays, which costs time instead of memory.

W2A16: `F.linear`. CPUs without 16-bit arithmetic multiply bf16 and fp16 one by one, about seven times slower than
float32, so there several rows are multiplied in float32, of a weight that stays 16 bits.

W2A8: small products go through `torch._int_mm` (lowest overhead) where that is oneDNN's, others through oneDNN's
prepacked `qlinear`, which scales its sums before they leave the registers; large ones in blocks whose results stay in
cache meanwhile. Both sums are exact integers. AVX2 adds two products of a byte in 16 bits, which saturates: trits as
+-1 stay far below that (2 * 255), so they must never be stored scaled.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tritflow.kernels import cpu_activations, reference
from tritflow.kernels.backends import Backend, Kernel
from tritflow.kernels.expansion import EXPANSION, expanded, stamp

_ROWS, _COLUMNS = 1024, 1536  # of a product of qlinear: enough for its blocking, and a result that stays in cache
_QLINEAR_FROM = 1 << 20  # weights from this many trits on are prepacked,
_QLINEAR_RESULT = 1 << 14  # and smaller ones once a result has this many elements
_RESULT_CHUNK = 1 << 19  # elements of a smaller weight's result in one go: more would be fresh pages at every call

_ql: Any = torch.ops.onednn
_mkldnn: Any = torch.ops.mkldnn


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
    """Whether `torch._int_mm` is exact and not a naive loop, which is tens of times slower than float32."""
    if not torch.backends.mkldnn.is_available():
        return False
    exact = _exact(lambda q, t: torch._int_mm((q.int() - 128).to(torch.int8), t.t()) + 128 * t.sum(1).int())
    return exact and not _is_a_loop(torch._int_mm)


def _is_a_loop(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Whether an int8 product takes many times what float32 takes. Nothing else tells: which instructions PyTorch asks
    for before it calls oneDNN changed between releases. The two lie far apart, so a busy machine does not matter."""
    q = torch.ones((64, 256), dtype=torch.int8)
    x = q.float()

    def fastest(run: Callable[[], Any]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
        return min(times)

    return fastest(lambda: product(q, q.t())) > 8 * fastest(lambda: x @ x.t()) + 1e-4


@cache
def _has_qlinear() -> bool:
    def product(q: Tensor, t: Tensor) -> Tensor:
        ones, zeros = torch.ones(t.shape[0]), torch.zeros(t.shape[0], dtype=torch.int64)
        return _qlinear(q, 0, _ql.qlinear_prepack(t, list(q.shape)), ones, zeros)

    return torch.backends.mkldnn.is_available() and _exact(product)


@cache
def _is_emulated(dtype: torch.dtype) -> bool:
    """Whether this machine multiplies matrices of a 16-bit type number by number, without oneDNN."""
    probes = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    if dtype not in probes or not torch.backends.mkldnn.is_available():
        return False
    try:
        return not getattr(_mkldnn, probes[dtype])()
    except (RuntimeError, AttributeError):
        return False


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

    key = ("dense", x.dtype, stamp(weight), stamp(weight_scale), stamp(input_scale))
    return expanded(weight, key, build)


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
        if x.shape[-1] < x.numel() and _is_emulated(x.dtype):  # one row alone has a fast loop of its own
            return F.linear(x.float(), dense.float(), None if bias is None else bias.float()).to(x.dtype)
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
        self.prepacked = (large or trits.numel() >= _QLINEAR_FROM or not _has_int_mm()) and _has_qlinear()
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

    key = ("int8", stamp(weight), stamp(weight_scale), stamp(input_scale))
    form: _Int8 = expanded(weight, key, build)
    if large and not form.prepacked and _has_qlinear():
        # Once prepacked it stays so: batches of different sizes in turn shall not expand a weight again and again.
        getattr(weight, EXPANSION).drop()
        form = expanded(weight, key, build)
    if form.input_scale is None:
        q, amax = cpu_activations.last.quantize(x, form.unsigned)
    else:
        q, amax = cpu_activations.quantize(x.reshape(-1, x.shape[-1]), form.input_scale, form.unsigned)
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

    key = ("int8 matmul", stamp(weight), stamp(weight_scale))
    form: _Int8 = expanded(weight, key, build)
    rows = (q.view(torch.uint8) ^ 128) if form.unsigned else q
    # The form holds weight_scale / 127, because w2a8_linear multiplies with a row's largest magnitude.
    out = _products(form, rows, x_scale[:, None] * 127.0, bias, dtype)
    if low is not None and up is not None:
        reference.low_rank_add_(out, low, up)
    if residual is None or gate is None:
        return out
    return reference.gated_residual(residual, gate, out.view(residual.shape)).flatten(0, 1)


def _supports_matmul(q: Tensor, *args: Any) -> bool:
    return q.dtype == torch.int8 and q.numel() > 0 and (_has_int_mm() or _has_qlinear())


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
    return activation_dtype == "int8" and x.numel() > 0 and (_has_int_mm() or _has_qlinear())


BACKEND = Backend(
    name="cpu",
    device_types=("cpu",),
    why_not=lambda device: None,
    kernels={
        "quantize_activation": Kernel(cpu_activations.quantize_activation, cpu_activations.supports_quantize),
        "w2a16_linear": Kernel(w2a16_linear, _supports_w2a16),
        "w2a8_linear": Kernel(w2a8_linear, _supports_w2a8),
        "w2a8_matmul": Kernel(w2a8_matmul, _supports_matmul),
        "w2a16_low_rank": Kernel(
            reference.in_two_passes(w2a16_linear, reference.low_rank_add_), lambda *args: _supports_w2a16(*args[:-2])
        ),
    },
)
