"""The plain PyTorch truth: what every kernel must compute, on any device that torch knows.

W[n, k] = weight_scale[n] * T[n, k] * input_scale[k] with trits T in {-1, 0, 1}; weights come packed as
`tritflow.formats.packing` lays them out. Everything here is float32 (float64 for float64 activations) between
the inputs and the one rounding at the end. Tests and benchmarks import this file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritflow.formats.packing import unpack_2bit
from tritflow.kernels.backends import Backend, Kernel

QMAX = {"int8": 127.0, "float8_e4m3fn": 448.0}
"""Largest magnitude of each 8-bit activation type; int8 is symmetric, -128 never occurs."""
QTYPE = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}

AMAX_FLOOR = 1e-30
"""Rows smaller than this quantize to zeros instead of dividing by zero."""

# Up to here an int8 dot product stays below 2^24, so that float32 sums are exact in any order.
_EXACT_K = (1 << 24) // 127


def quantize_activation(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> tuple[Tensor, Tensor]:
    """Per-token symmetric 8-bit quantization: `x * input_scale ~= q * scale[:, None]`.

    With a = max(|x * input_scale|) over a row: scale = a / qmax, q = round_half_even(x * input_scale * (qmax / a)).

    Args:
        x: [..., K], any float type; leading dimensions are flattened to M.
        input_scale: [K] or None.
        dtype: `int8` (qmax 127) or `float8_e4m3fn` (qmax 448).

    Returns:
        q [M, K] and scale float32 [M].
    """
    return _quantize_rows(x.reshape(-1, x.shape[-1]).float(), input_scale, dtype)


def _quantize_rows(rows: Tensor, input_scale: Tensor | None, dtype: str) -> tuple[Tensor, Tensor]:
    qmax = QMAX[dtype]
    if input_scale is not None:
        rows = rows * input_scale.float()
    amax = rows.abs().amax(dim=-1, keepdim=True).clamp_min(AMAX_FLOOR)
    scaled = rows * (torch.full_like(amax, qmax) / amax)
    # A NaN or infinity poisons the scale, so it reaches the output whatever integer it becomes here.
    q = scaled.round().to(torch.int8) if dtype == "int8" else scaled.to(QTYPE[dtype])
    return q, (amax / qmax).squeeze(-1)


def trits(weight: Tensor, in_features: int) -> Tensor:
    """int8 [N, K] from packed bytes that were checked before."""
    # detach: a parameter that shows its logical shape becomes a plain tensor of bytes.
    return unpack_2bit(weight.detach(), in_features, check=False)


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """q [M, K] @ trits^T [K, N] as float32; exact for int8 `q`.

    Args:
        q: int8 or float8_e4m3fn.
        weight: packed uint8 [N, 32 * ceil(K / 128)].
    """
    t = trits(weight, q.shape[-1])
    if q.shape[-1] <= _EXACT_K or q.dtype != torch.int8:
        return q.float() @ t.float().t()
    parts = zip(q.split(_EXACT_K, dim=-1), t.split(_EXACT_K, dim=-1), strict=True)
    return torch.stack([(a.float() @ b.float().t()).long() for a, b in parts]).sum(0).float()


def w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> Tensor:
    """8-bit activations: `(q @ T^T) * weight_scale * scale + bias`, rounded once to x.dtype. See `ops.w2a8_linear`."""
    q, scale = quantize_activation(x, input_scale, activation_dtype)
    out = integer_product(q, weight) * weight_scale.float() * scale[:, None]
    if bias is not None:
        out = out + bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight_scale.shape[0])


def w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Full activations: `((x * input_scale) @ T^T) * weight_scale + bias`, rounded once. See `ops.w2a16_linear`."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = x.to(compute)
    if input_scale is not None:
        rows = rows * input_scale.to(compute)
    out = F.linear(rows, trits(weight, x.shape[-1]).to(compute)) * weight_scale.to(compute)
    if bias is not None:
        out = out + bias.to(compute)
    return out.to(x.dtype)


def dequantize(
    weight: Tensor,
    in_features: int,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The dense weight [N, K]: float32 products, rounded once to `dtype`. Exact in bf16 without `input_scale`."""
    dense = trits(weight, in_features) * weight_scale.float()[:, None]
    if input_scale is not None:
        dense *= input_scale.float()
    return dense.to(dtype)


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift` in float32, rounded once to x.dtype. See `block_ops.adaln`."""
    return _adaln(x, shift, scale, eps).to(x.dtype)


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(x.float(), (x.shape[-1],), eps=eps)
    return normed * (1 + scale.float())[:, None] + shift.float()[:, None]


def adaln_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: str = "int8",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`quantize_activation(adaln(x))` without the rounding between the two. See `block_ops.adaln_quantize`."""
    return _quantize_rows(_adaln(x, shift, scale, eps).flatten(0, 1), input_scale, dtype)


def gelu(x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """tanh GELU behind features that pass as they are. See `block_ops.gelu`."""
    y = F.gelu(x, approximate="tanh")
    return y if prefix is None else torch.cat([prefix, y], dim=-1)


def gelu_quantize(
    x: Tensor, prefix: Tensor | None = None, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    """`quantize_activation(cat(prefix, gelu(x)))` without a rounding between. See `block_ops.gelu_quantize`."""
    rows = F.gelu(x.float(), approximate="tanh")
    if prefix is not None:
        rows = torch.cat([prefix.float(), rows], dim=-1)
    return _quantize_rows(rows.reshape(-1, rows.shape[-1]), input_scale, dtype)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """RMS norm over each head, then rotation of neighbouring pairs, in float32. See `block_ops.qk_norm_rope`."""
    queries = [(q, q_weight)] if context_q is None else [(context_q, context_q_weight), (q, q_weight)]
    keys = [(k, k_weight)] if context_k is None else [(context_k, context_k_weight), (k, k_weight)]
    return _norm_rope(queries, cos, sin, eps), _norm_rope(keys, cos, sin, eps)


def _norm_rope(parts: list[Any], cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x = torch.cat([F.rms_norm(p.float(), (p.shape[-1],), w.float(), eps) for p, w in parts], dim=1)
    even, odd = x[..., ::2], x[..., 1::2]
    rotated = torch.stack([-odd, even], dim=-1).flatten(-2)
    out = x * cos.float()[None, :, None] + rotated * sin.float()[None, :, None]
    return out.to(parts[0][0].dtype)


def gated_residual(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`residual + gate * y` in float32, rounded once. See `block_ops.gated_residual`."""
    return (residual.float() + gate.float()[:, None] * y.float()).to(residual.dtype)


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
    """`w2a8_linear` on activations that are quantized already. See `matmul_op.w2a8_matmul`."""
    out = integer_product(q, weight) * weight_scale.float() * x_scale[:, None]
    if bias is not None:
        out = out + bias.float()
    if low is not None and up is not None:
        out = out + low_rank_up(low, up)
    if residual is None or gate is None:
        return out.to(dtype)
    return gated_residual(residual, gate, out.view(residual.shape)).to(dtype).flatten(0, 1)


def low_rank_down(q: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    """`(q @ down^T) * x_scale[:, None]`, rounded once to down.dtype. See `low_rank_op.low_rank_down`."""
    return ((q.float() @ down.float().t()) * x_scale[:, None]).to(down.dtype)


def low_rank_up(low: Tensor, up: Tensor) -> Tensor:
    """float32 [M, N]: `low @ up^T`, S groups of rows of `up` with their columns of `low`. See `low_rank_op`."""
    rank = up.shape[1]
    x, b = low.float().unflatten(1, (-1, rank)), up.float().view(low.shape[1] // rank, -1, rank)
    return torch.einsum("msr,snr->msn", x, b).flatten(1)


def low_rank_add_(y: Tensor, low: Tensor, up: Tensor) -> None:
    """`y += low @ up^T`, rounded once. See `low_rank_op.low_rank_add_`."""
    y.copy_(y.float() + low_rank_up(low, up))


def w2a16_low_rank(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
) -> Tensor:
    """`w2a16_linear` plus `low @ up^T`, rounded once. See `low_rank_op.w2a16_low_rank`."""
    out = w2a16_linear(x.float(), weight, weight_scale, bias, input_scale)
    return (out + low_rank_up(low, up).view(out.shape)).to(x.dtype)


def in_two_passes(linear: Callable[..., Tensor], add_: Callable[..., None]) -> Callable[..., Tensor]:
    """`w2a16_low_rank` of a backend whose product does not take the update: the product, then a pass over it."""

    def run(x: Tensor, *rest: Any) -> Tensor:
        *args, low, up = rest
        y = linear(x, *args)
        add_(y.view(-1, y.shape[-1]), low, up)
        return y

    return run


def _attention(q: Tensor, k: Tensor, v: Tensor, dtype: str, scale: float | None) -> Tensor:
    from tritflow.kernels.attention_reference import attention  # which uses this module's constants

    return attention(q, k, v, dtype, scale)


def _normed_attention(*args: Any) -> Tensor:
    from tritflow.kernels.attention_reference import normed_attention

    return normed_attention(*args)


def _always(*args: object) -> bool:
    return True


BACKEND = Backend(
    name="reference",
    device_types=(),
    why_not=lambda device: None,
    kernels={
        "quantize_activation": Kernel(quantize_activation, _always),
        "w2a16_linear": Kernel(w2a16_linear, _always),
        "w2a8_linear": Kernel(w2a8_linear, _always),
        "adaln": Kernel(adaln, _always),
        "adaln_quantize": Kernel(adaln_quantize, _always),
        "gelu": Kernel(gelu, _always),
        "gelu_quantize": Kernel(gelu_quantize, _always),
        "qk_norm_rope": Kernel(qk_norm_rope, _always),
        "gated_residual": Kernel(gated_residual, _always),
        "w2a8_matmul": Kernel(w2a8_matmul, _always),
        "low_rank_down": Kernel(low_rank_down, _always),
        "low_rank_add_": Kernel(low_rank_add_, _always),
        "w2a16_low_rank": Kernel(w2a16_low_rank, _always),
        "attention": Kernel(_attention, _always),
        "normed_attention": Kernel(_normed_attention, _always),
    },
)
