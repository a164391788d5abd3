"""How the plain Triton kernels plug into the table of backends."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from tritflow.kernels.backends import Backend, Kernel
from tritflow.kernels.reference import in_two_passes
from tritflow.kernels.triton import block
from tritflow.kernels.triton.adaln import adaln, adaln_quantize
from tritflow.kernels.triton.gemm import w2a8_gemm, w2a16_gemm
from tritflow.kernels.triton.low_rank import low_rank_add_, low_rank_down
from tritflow.kernels.triton.quantize import MAX_FEATURES, quantize_activation
from tritflow.kernels.triton.rope import qk_norm_rope

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_MAX_HEAD = 512


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _why_not(device: torch.device) -> str | None:
    if torch.version.hip is None and _capability(device.index) < (8, 0):
        return f"compute capability {_capability(device.index)} is below 8.0"
    return None


def _has_fp8(device: torch.device) -> bool:
    # Interpreted on the CPU anything goes; AMD's fp8 of before gfx950 reads the bits differently.
    return device.type == "cpu" or (torch.version.hip is None and _capability(device.index) >= (8, 9))


def _supports_quantize(x: Tensor, input_scale: Tensor | None = None, dtype: str = "int8") -> bool:
    return x.dtype in _FLOATS and x.shape[-1] <= MAX_FEATURES and (dtype == "int8" or _has_fp8(x.device))


def _rows(x: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """See `tritflow.kernels.w2a16_linear`."""
    out = w2a16_gemm(_rows(x), weight.contiguous(), weight_scale, bias, input_scale)
    return out.view(*x.shape[:-1], out.shape[-1])


def _supports_w2a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> bool:
    return x.dtype in _FLOATS


def w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> Tensor:
    """See `tritflow.kernels.w2a8_linear`."""
    q, scale = quantize_activation(x, input_scale, activation_dtype)
    out = w2a8_gemm(q, scale, weight.contiguous(), weight_scale, bias, x.dtype)
    return out.view(*x.shape[:-1], out.shape[-1])


def _supports_w2a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> bool:
    return _supports_quantize(x, input_scale, activation_dtype)


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
    """See `tritflow.kernels.w2a8_matmul`; for one batch the gated residual is part of the product's epilogue."""
    product = (q.contiguous(), x_scale, weight.contiguous(), weight_scale, bias, dtype)
    factors = (low if low is None or low.stride(1) == 1 else low.contiguous(), None if up is None else up.contiguous())
    if residual is None or gate is None:
        return w2a8_gemm(*product, None, None, *factors)
    if residual.shape[0] == 1:
        rows = residual[0] if residual.stride(-1) == 1 else residual[0].contiguous()
        return w2a8_gemm(*product, rows, gate[0].contiguous(), *factors)
    y = w2a8_gemm(*product, None, None, *factors)
    return block.gated_residual(residual, gate, y.view(residual.shape)).flatten(0, 1)


def _supports_matmul(
    q: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype, *rest: Any
) -> bool:
    return dtype in _FLOATS and (q.dtype == torch.int8 or _has_fp8(q.device))


def _supports_down(q: Tensor, x_scale: Tensor, down: Tensor) -> bool:
    return down.dtype in _FLOATS and (q.dtype == torch.int8 or _has_fp8(q.device))


def _supports_low_rank_add(y: Tensor, *rest: Any) -> bool:
    return y.dtype in _FLOATS


def _supports_adaln(x: Tensor, *rest: Any) -> bool:
    return x.dtype in _FLOATS and x.shape[-1] <= MAX_FEATURES


def _supports_adaln_quantize(
    x: Tensor, shift: Tensor, scale: Tensor, input_scale: Tensor | None, dtype: str, eps: float
) -> bool:
    return _supports_quantize(x, input_scale, dtype)


def _supports_gelu(x: Tensor, prefix: Tensor | None) -> bool:
    width = 0 if prefix is None else prefix.shape[-1]
    return x.dtype in _FLOATS and x.shape[-1] + width <= MAX_FEATURES


def _supports_gelu_quantize(x: Tensor, prefix: Tensor | None, input_scale: Tensor | None, dtype: str) -> bool:
    width = 0 if prefix is None else prefix.shape[-1]
    return _supports_quantize(x, input_scale, dtype) and x.shape[-1] + width <= MAX_FEATURES


def _supports_rope(q: Tensor, *rest: Any) -> bool:
    return q.dtype in _FLOATS and q.shape[-1] <= _MAX_HEAD


def _supports_residual(residual: Tensor, gate: Tensor, y: Tensor) -> bool:
    return residual.dtype in _FLOATS and y.dtype in _FLOATS


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: str, scale: float | None) -> Tensor:
    """See `tritflow.kernels.attention`; values and weights in 16 bits where there is no e4m3."""
    from tritflow.kernels.triton.attention import attention as run

    return run(q, k, v, dtype, scale, e4m3=_has_fp8(q.device))


def normed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """See `tritflow.kernels.normed_attention`; without e4m3 a pass of its own norms and turns."""
    from tritflow.kernels.triton import attention as kernels

    if _has_fp8(q.device):
        return kernels.normed_attention(q, k, v, *rest)
    q_weight, k_weight, cos, sin, context_q, context_k, context_v, q_before, k_before, eps, dtype, scale = rest
    if cos.shape[1] != q.shape[-1]:
        cos, sin = (t.repeat_interleave(2, dim=1) for t in (cos, sin))
    q, k = qk_norm_rope(q, k, q_weight, k_weight, cos, sin, context_q, context_k, q_before, k_before, eps)
    v = v if context_v is None else torch.cat([context_v, v], dim=1)
    return kernels.attention(q, k, v, dtype, scale, e4m3=False)


def _supports_attention(q: Tensor, k: Tensor, v: Tensor, dtype: str, scale: float | None) -> bool:
    features, e4m3 = q.shape[-1], _has_fp8(q.device)
    # 8-bit products take 32 features at a time; values that stay in float32 fill the shared memory of small GPUs.
    most = 128 if q.dtype == torch.float32 and not e4m3 else 256
    fits = 32 <= features <= most and features & (features - 1) == 0
    return q.dtype in _FLOATS and fits and (dtype == "int8" or e4m3)


def _supports_normed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> bool:
    return _supports_attention(q, k, v, *rest[-2:])


BACKEND = Backend(
    name="triton",
    device_types=("cuda",),
    why_not=_why_not,
    kernels={
        "quantize_activation": Kernel(quantize_activation, _supports_quantize),
        "w2a16_linear": Kernel(w2a16_linear, _supports_w2a16),
        "w2a16_low_rank": Kernel(in_two_passes(w2a16_linear, low_rank_add_), lambda x, *_: x.dtype in _FLOATS),
        "w2a8_linear": Kernel(w2a8_linear, _supports_w2a8),
        "w2a8_matmul": Kernel(w2a8_matmul, _supports_matmul),
        "low_rank_down": Kernel(low_rank_down, _supports_down),
        "low_rank_add_": Kernel(low_rank_add_, _supports_low_rank_add),
        "adaln": Kernel(adaln, _supports_adaln),
        "adaln_quantize": Kernel(adaln_quantize, _supports_adaln_quantize),
        "gelu": Kernel(block.gelu, _supports_gelu),
        "gelu_quantize": Kernel(block.gelu_quantize, _supports_gelu_quantize),
        "qk_norm_rope": Kernel(qk_norm_rope, _supports_rope),
        "attention": Kernel(attention, _supports_attention),
        "normed_attention": Kernel(normed_attention, _supports_normed_attention),
        "gated_residual": Kernel(block.gated_residual, _supports_residual),
    },
)
