"""The scratch route: expand a weight once a call into dense memory, then multiply with the vendor's library.

Costs a pass over the weight (about 4 % of the product at 4,608 tokens, a third at 512) and the dense weight's bytes
for the time of the product. In return it runs at cuBLAS' speed, which is hard to beat for many tokens: e4m3 through
`torch._scaled_mm`, int8 through `torch._int_mm` (exact), 16-bit activations through `F.linear`.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tritflow.kernels import reference
from tritflow.kernels.backends import Backend, Kernel

_INT_MM_TOKENS = 32  # torch._int_mm on CUDA refuses 16 and fewer: those are padded with zeros
_UNIT = 16  # what cuBLASLt's 8-bit products want N and K to be multiples of


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def _why_not(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError:
        return "Triton, which expands the weight, is not installed"
    if _capability(device.index) < (8, 0):
        return f"compute capability {_capability(device.index)} is below 8.0"
    return None


def _multiples(n: int, k: int) -> bool:
    return n % _UNIT == 0 and k % _UNIT == 0 and n > 0


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
    if not _multiples(weight.shape[0], q.shape[1]):
        return False
    if q.dtype == torch.int8:
        return q.shape[0] > 0
    # Row-wise scales came with Hopper; before, cuBLASLt takes one scale a matrix.
    return dtype == torch.bfloat16 and q.shape[0] > 0 and _capability(q.device.index) >= (9, 0)


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
    """See `tritflow.kernels.w2a8_matmul`. e4m3 sums are those of the library's fast accumulation.

    A low-rank update is a pass of its own, and the gated residual behind it another one.
    """
    from tritflow.kernels.triton.block import gated_residual, scale_sums
    from tritflow.kernels.triton.expand import expand
    from tritflow.kernels.triton.low_rank import low_rank_add_

    if low is not None and up is not None:
        out = w2a8_matmul(q, x_scale, weight, weight_scale, dtype, bias)
        low_rank_add_(out, low, up)
        if residual is None or gate is None:
            return out
        return gated_residual(residual, gate, out.view(residual.shape)).flatten(0, 1)

    dense = expand(weight.contiguous(), q.shape[1], q.dtype)
    if q.dtype == torch.int8:
        tokens = q.shape[0]
        if tokens < _INT_MM_TOKENS:
            q = F.pad(q, (0, 0, 0, _INT_MM_TOKENS - tokens))
        sums = torch._int_mm(q, dense.t())[:tokens]
        del dense
        return scale_sums(sums, x_scale, weight_scale, dtype, bias, residual, gate)
    out = torch._scaled_mm(
        q,
        dense.t(),
        x_scale[:, None],
        weight_scale.float()[None],
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
    )
    del dense
    if residual is None or gate is None:
        return out
    return gated_residual(residual, gate, out.view(residual.shape)).flatten(0, 1)


def w2a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> Tensor:
    """See `tritflow.kernels.w2a8_linear`."""
    from tritflow.kernels.triton.quantize import quantize_activation

    q, scale = quantize_activation(x, input_scale, activation_dtype)
    return w2a8_matmul(q, scale, weight, weight_scale, x.dtype, bias).view(*x.shape[:-1], weight.shape[0])


def _supports_w2a8(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
    activation_dtype: str = "int8",
) -> bool:
    from tritflow.kernels.triton.quantize import MAX_FEATURES

    tokens = x.numel() // x.shape[-1]
    if x.dtype == torch.float64 or x.shape[-1] > MAX_FEATURES or not _multiples(weight.shape[0], x.shape[-1]):
        return False
    if activation_dtype == "int8":
        return tokens > 0
    return x.dtype == torch.bfloat16 and tokens > 0 and _capability(x.device.index) >= (9, 0)


def w2a16_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Tensor:
    """See `tritflow.kernels.w2a16_linear`: exact weights in bf16, products and sums of the library."""
    from tritflow.kernels.triton.expand import expand

    dense = expand(weight.contiguous(), x.shape[-1], x.dtype, weight_scale)
    if input_scale is not None:
        x = (x.float() * input_scale.float()).to(x.dtype)
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _supports_w2a16(x: Tensor, *args: Any) -> bool:
    return x.dtype in (torch.bfloat16, torch.float16) and x.numel() > 0


def w2a16_low_rank(x: Tensor, *rest: Any) -> Tensor:
    """See `tritflow.kernels.w2a16_low_rank`."""
    from tritflow.kernels.triton.low_rank import low_rank_add_

    return reference.in_two_passes(w2a16_linear, low_rank_add_)(x, *rest)


BACKEND = Backend(
    name="scratch",
    device_types=("cuda",),
    why_not=_why_not,
    kernels={
        "w2a16_linear": Kernel(w2a16_linear, _supports_w2a16),
        "w2a16_low_rank": Kernel(w2a16_low_rank, _supports_w2a16),
        "w2a8_linear": Kernel(w2a8_linear, _supports_w2a8),
        "w2a8_matmul": Kernel(w2a8_matmul, _supports_matmul),
    },
)
