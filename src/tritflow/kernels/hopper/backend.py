"""How the Hopper kernels plug into the table of backends: what they take, and where plain Triton helps them out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.kernels import tuning
from tritflow.kernels.backends import Backend, Kernel
from tritflow.kernels.hopper import supports, why_not

_FROM_TOKENS = 64  # below, a tile of 128 tokens is mostly padding and plain Triton's small tiles do better
_SKINNY_TOKENS = 8
_TILE_ROWS = 256  # the most weight rows of a tile


def _shape(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    return x.numel() // x.shape[-1], weight.shape[0], x.shape[-1]


def w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> Tensor:
    """See `tritflow.kernels.w2a8_linear`; bf16 in and out."""
    # Imported on use: Gluon comes with some releases of Triton only, and `why_not` has been asked by now.
    from tritflow.kernels.hopper.launch import w2a8_gemm
    from tritflow.kernels.triton.quantize import quantize_activation

    q, scale = quantize_activation(x, input_scale, activation_dtype)
    return w2a8_gemm(q, scale, weight, weight_scale, bias).view(*x.shape[:-1], weight.shape[0])


def _supports_w2a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> bool:
    m, n, k = _shape(x, weight)
    return x.dtype == torch.bfloat16 and m >= _FROM_TOKENS and supports(m, n, k)


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
    """See `tritflow.kernels.w2a8_matmul`; the gated residual in a pass of its own."""
    from tritflow.kernels.hopper.launch import w2a8_gemm
    from tritflow.kernels.triton.block import gated_residual

    out = w2a8_gemm(q, x_scale, weight, weight_scale, bias, low, up)
    if residual is None or gate is None:
        return out
    return gated_residual(residual, gate, out.view(residual.shape)).flatten(0, 1)


def _supports_matmul(
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
) -> bool:
    m, n, k = _shape(q, weight)
    fits = dtype == torch.bfloat16 and m >= _FROM_TOKENS and supports(m, n, k)
    return fits and (low is None or up is None or _one_group_a_tile(n, low, up))


def w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """See `tritflow.kernels.w2a16_linear`; a few rows of bf16, as modulation has, or many."""
    from tritflow.kernels.hopper.launch import w2a16_gemm
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    rows = x.reshape(-1, x.shape[-1])
    if input_scale is not None:
        rows = (rows * input_scale).to(rows.dtype)  # one rounding, as in the other backends
    if rows.shape[0] <= _SKINNY_TOKENS:
        choice = tuning.lookup(x.device, tuning.W2A16, *_shape(x, weight))
        settings = {} if choice is None or choice.backend != "hopper" else choice.config
        out = w2a16_skinny(rows, weight, weight_scale, bias, **settings)
    else:
        out = w2a16_gemm(rows, weight, weight_scale, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def _supports_w2a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> bool:
    m, n, k = _shape(x, weight)
    if m <= _SKINNY_TOKENS:
        return x.dtype == torch.bfloat16 and m > 0 and k % 256 == 0
    return x.dtype in (torch.bfloat16, torch.float16) and m >= _FROM_TOKENS and supports(m, n, k)


def w2a16_low_rank(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
) -> Tensor:
    """See `tritflow.kernels.w2a16_low_rank`; many rows."""
    from tritflow.kernels.hopper.launch import w2a16_gemm

    rows = x.reshape(-1, x.shape[-1])
    if input_scale is not None:
        rows = (rows * input_scale).to(rows.dtype)
    return w2a16_gemm(rows, weight, weight_scale, bias, low, up).view(*x.shape[:-1], weight.shape[0])


def _supports_w2a16_low_rank(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
) -> bool:
    m, n, k = _shape(x, weight)
    fits = x.dtype in (torch.bfloat16, torch.float16) and m >= _FROM_TOKENS and supports(m, n, k)
    return fits and _one_group_a_tile(n, low, up)


def _one_group_a_tile(n: int, low: Tensor, up: Tensor) -> bool:
    """Whether no tile lies in the rows of two layers."""
    groups = low.shape[1] // up.shape[1]
    return groups == 1 or n // groups % _TILE_ROWS == 0


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: str, scale: float | None) -> Tensor:
    """See `tritflow.kernels.attention`."""
    from tritflow.kernels.hopper.attention_launch import attention as run

    return run(q, k, v, dtype, scale)


def _supports_attention(q: Tensor, k: Tensor, v: Tensor, dtype: str, scale: float | None) -> bool:
    return q.shape[-1] in (64, 128) and q.dtype in (torch.bfloat16, torch.float16, torch.float32)


def normed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """See `tritflow.kernels.normed_attention`."""
    from tritflow.kernels.hopper.attention_launch import normed_attention as run

    return run(q, k, v, *rest)


def _supports_normed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    return _supports_attention(q, k, v, *rest[-2:])


BACKEND = Backend(
    name="hopper",
    device_types=("cuda",),
    why_not=lambda device: why_not(device.index or 0),
    kernels={
        "w2a8_linear": Kernel(w2a8_linear, _supports_w2a8),
        "w2a8_matmul": Kernel(w2a8_matmul, _supports_matmul),
        "w2a16_linear": Kernel(w2a16_linear, _supports_w2a16),
        "w2a16_low_rank": Kernel(w2a16_low_rank, _supports_w2a16_low_rank),
        # In e4m3 2 % faster than plain Triton's alone, in int8 slower: by name only.
        "attention": Kernel(attention, _supports_attention, automatic=False),
        "normed_attention": Kernel(normed_attention, _supports_normed_attention, automatic=False),
    },
)
