"""`tritflow::attention`: softmax attention on 8-bit tensor cores, without mask, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.kernels.backends import select
from tritflow.kernels.ops import _check_activation_dtype, _dispatched

_LIB = torch.library.Library("tritflow", "FRAGMENT")


def _check(q: Tensor, k: Tensor, v: Tensor, dtype: str) -> None:
    if q.dim() != 4 or not q.is_floating_point() or q.shape[-1] < 1:
        raise ValueError(f"q must be a float tensor [batch, tokens, heads, features], not {q.dtype} {list(q.shape)}")
    for name, other in (("k", k), ("v", v)):
        if other.shape != q.shape or other.dtype != q.dtype:
            raise ValueError(f"{name} must be like q, {q.dtype} {list(q.shape)}, not {other.dtype} {list(other.shape)}")
    _check_activation_dtype(dtype)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None, backend: str = "auto"
) -> Tensor:
    _check(q, k, v, dtype)
    args = (q, k, v, dtype, scale)
    out: Tensor = select("attention", backend, q.device, args)(*args)
    return out


def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None, backend: str = "auto"
) -> Tensor:
    _check(q, k, v, dtype)
    return q.new_empty(q.shape)


_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, str dtype='int8', float? scale=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("tritflow::attention", _attention_fake, lib=_LIB)
_OP: Any = torch.ops.tritflow.attention.default


def attention(
    q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None, backend: str = "auto"
) -> Tensor:
    """`softmax(scale q k^T) v` with both products in 8 bits; not differentiable.

    Queries are quantized by token and head, keys by head and 128 tokens after what they share is subtracted (the
    softmax does not see it), values and the softmax's weights to e4m3, values with a power of two by head and 128
    tokens. Where a GPU has no e4m3, values and weights stay in 16 bits. Sums are float32 (exact integers for `int8`
    logits). Leads: SageAttention2 (arXiv 2411.10958), FlashAttention-3 (arXiv 2407.08608).

    Args:
        q: [B, S, H, D], fp32, bf16 or fp16, any strides with D contiguous.
        k: like q.
        v: like q.
        dtype: of queries and keys, `int8` or `float8_e4m3fn`. `int8` is the more accurate.
        scale: of the logits; D**-.5 by default.
        backend: `auto`, `reference`, `triton` or `hopper`.

    Returns:
        [B, S, H, D] in q.dtype, contiguous on a GPU.

    Raises:
        ValueError: shapes or dtypes that differ, or an unknown dtype.
        BackendError: the named backend does not exist, cannot run here, or does not take these arguments.
    """
    out: Tensor = (_OP if _dispatched(q, None) else _attention)(q, k, v, dtype, scale, backend)
    return out
