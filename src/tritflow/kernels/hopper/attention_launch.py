"""Host side of 8-bit attention on Hopper."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tritflow.kernels.attention_reference import BLOCK
from tritflow.kernels.hopper.attention import attention_kernel
from tritflow.kernels.reference import AMAX_FLOOR, QMAX
from tritflow.kernels.triton.attention import quantize_keys_values
from tritflow.kernels.triton.block import contiguous_features

FEATURES = (64, 128)
"""Head dimensions that the kernel takes."""
_KEYS = 128  # of a tile


def attend(
    q: Tensor,
    quantized: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float | None = None,
    *,
    codes: int = 1,
    ones: bool = True,
    stages: int = 3,
    in_turn: bool = False,
) -> Tensor:
    """Attention of q [B, S, H, D], D contiguous, on what `quantize_keys_values` gave.

    codes 0 takes the weights by exp2, 1 and 2 write them in e4m3's bits at once; ones sums them on the tensor cores.
    """
    k8, v8, k_scale, v_exponent = quantized
    batch, tokens, heads, features = q.shape
    padded = k_scale.shape[1] * BLOCK
    int8 = k8.dtype == torch.int8
    dtype = gl.int8 if int8 else gl.float8e4nv
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    k_block, v_block = [_KEYS, features], [features, _KEYS]
    swizzled = gl.NVMMASharedLayout.get_default_for
    kernel = attention_kernel
    if in_turn:
        from tritflow.kernels.hopper.attention_in_turn import attention_kernel as kernel
    kernel[(triton.cdiv(tokens, 128), batch * heads)](
        q,
        TensorDescriptor(k8, list(k8.shape), [features, 1], k_block, swizzled(k_block, dtype)),
        TensorDescriptor(v8, list(v8.shape), [padded, 1], v_block, swizzled(v_block, gl.float8e4nv)),
        k_scale,
        v_exponent,
        out,
        (features**-0.5 if scale is None else scale) * math.log2(math.e),
        *q.stride()[:3],
        *out.stride()[:3],
        heads,
        S=tokens,
        PADDED=padded,
        STAGES=stages,
        BLOCK=BLOCK,
        QMAX=QMAX["int8" if int8 else "float8_e4m3fn"],
        FLOOR=AMAX_FLOOR,
        CODES=codes,
        ONES=ones,
        num_warps=4,
    )
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None) -> Tensor:
    """See `tritflow.kernels.attention`."""
    if not q.numel():
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (contiguous_features(t) for t in (q, k, v))
    return attend(q, quantize_keys_values(k, v, dtype), scale)
