"""How the plain Triton kernels plug into the table of backends."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tritflow.kernels.backends import Backend, Kernel
from tritflow.kernels.triton.gemm import w2a8_gemm, w2a16_gemm
from tritflow.kernels.triton.quantize import MAX_FEATURES, quantize_activation

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


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


BACKEND = Backend(
    name="triton",
    device_types=("cuda",),
    why_not=_why_not,
    kernels={
        "quantize_activation": Kernel(quantize_activation, _supports_quantize),
        "w2a16_linear": Kernel(w2a16_linear, _supports_w2a16),
        "w2a8_linear": Kernel(w2a8_linear, _supports_w2a8),
    },
)
