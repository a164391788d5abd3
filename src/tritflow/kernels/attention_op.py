"""`tritflow::attention` and `normed_attention`: softmax attention on 8-bit tensor cores, no mask, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.kernels.backends import select
from tritflow.kernels.block_ops import check_rope
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


def _check_normed(args: tuple[Any, ...]) -> int:
    """Tokens in all."""
    q, k, v, q_weight, k_weight, cos, sin, context_q, context_k, context_v, *weights, eps, dtype, _ = args
    _check(q, k, v, dtype)
    if (context_v is None) != (context_q is None):
        raise ValueError("context_q, context_k, context_v and two weights come together or not at all")
    if context_q is not None and (context_v.shape != context_q.shape or context_v.dtype != q.dtype):
        raise ValueError(f"context_v {list(context_v.shape)} and context_q {list(context_q.shape)} differ")
    if cos.dim() == 2 and cos.shape[1] * 2 == q.shape[-1]:
        cos, sin = (t.repeat_interleave(2, dim=1) if t.dim() == 2 else t for t in (cos, sin))
    return check_rope((q, k, q_weight, k_weight, cos, sin, context_q, context_k, *weights, eps))


def _normed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    dtype: str = "int8",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    context = (context_q, context_k, context_v, context_q_weight, context_k_weight)
    args = (q, k, v, q_weight, k_weight, cos, sin, *context, eps, dtype, scale)
    _check_normed(args)
    out: Tensor = select("normed_attention", backend, q.device, args)(*args)
    return out


def _normed_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    dtype: str = "int8",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    context = (context_q, context_k, context_v, context_q_weight, context_k_weight)
    tokens = _check_normed((q, k, v, q_weight, k_weight, cos, sin, *context, eps, dtype, scale))
    return q.new_empty((q.shape[0], tokens, *q.shape[2:]))


_LIB.define(
    "attention(Tensor q, Tensor k, Tensor v, str dtype='int8', float? scale=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("attention", _attention, "CompositeExplicitAutograd")
torch.library.register_fake("tritflow::attention", _attention_fake, lib=_LIB)
_LIB.define(
    "normed_attention(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin,"
    " Tensor? context_q=None, Tensor? context_k=None, Tensor? context_v=None, Tensor? context_q_weight=None,"
    " Tensor? context_k_weight=None, float eps=1e-6, str dtype='int8', float? scale=None, str backend='auto')"
    " -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("normed_attention", _normed_attention, "CompositeExplicitAutograd")
torch.library.register_fake("tritflow::normed_attention", _normed_attention_fake, lib=_LIB)
_OP: Any = torch.ops.tritflow.attention.default
_NORMED: Any = torch.ops.tritflow.normed_attention.default


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


def normed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    context_q: Tensor | None = None,
    context_k: Tensor | None = None,
    context_v: Tensor | None = None,
    context_q_weight: Tensor | None = None,
    context_k_weight: Tensor | None = None,
    eps: float = 1e-6,
    dtype: str = "int8",
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """`attention` of what `qk_norm_rope` makes of q and k, without that ever being in memory in 16 bits.

    Args:
        q, k, v: [B, S, H, D], any strides with D contiguous.
        q_weight, k_weight: [D] of the norms.
        cos, sin: float32 [C + S, D], or [C + S, D / 2] where both numbers of a pair are turned by the same angle.
        context_q, context_k, context_v: [B, C, H, D] of the text stream, which comes first; or None (C = 0).
        context_q_weight, context_k_weight: [D].
        eps: of the norms.
        dtype, scale, backend: those of `attention`.

    Returns:
        [B, C + S, H, D] in q.dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit together.
        BackendError: the named backend does not exist, cannot run here, or does not take these arguments.
    """
    run = _NORMED if _dispatched(q, None) else _normed_attention
    context = (context_q, context_k, context_v, context_q_weight, context_k_weight)
    out: Tensor = run(q, k, v, q_weight, k_weight, cos, sin, *context, eps, dtype, scale, backend)
    return out
