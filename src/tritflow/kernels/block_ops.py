"""Operations of whole transformer blocks, `tritflow::*`, for the fused forward: what lies between two products.

Each replaces a chain of elementwise passes over [tokens, features] by one. They are for inference: no gradients.
Numerics: float32 from the inputs to the one rounding at the end, so results differ from the chain's by the
roundings in between that are gone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritflow.kernels import reference
from tritflow.kernels.backends import select
from tritflow.kernels.ops import _check_activation_dtype, _dispatched

_LIB = torch.library.Library("tritflow", "FRAGMENT")


def check_modulation(x: Tensor, **vectors: Tensor) -> None:
    """Raise ValueError unless x is [B, S, K] and every vector [B, K]."""
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"x must be a float tensor [batch, tokens, features], not {x.dtype} {list(x.shape)}")
    for name, vector in vectors.items():
        if vector.shape != (x.shape[0], x.shape[2]):
            raise ValueError(f"{name} must have shape {[x.shape[0], x.shape[2]]}, not {list(vector.shape)}")


def _check_columns(input_scale: Tensor | None, features: int) -> None:
    if input_scale is not None and input_scale.shape != (features,):
        raise ValueError(f"input_scale must have shape [{features}], not {list(input_scale.shape)}")


def _run(op: str, x: Tensor, args: tuple[Any, ...]) -> Any:
    return select(op, "auto", x.device, args)(*args)


def _quantized_like(x: Tensor, tokens: int, features: int, dtype: str) -> tuple[Tensor, Tensor]:
    q = x.new_empty((tokens, features), dtype=reference.QTYPE[dtype])
    return q, x.new_empty((tokens,), dtype=torch.float32)


# --- adaln ----------------------------------------------------------------------------------------------------


def _check_adaln(x: Tensor, shift: Tensor, scale: Tensor) -> None:
    check_modulation(x, shift=shift, scale=scale)


def _adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    _check_adaln(x, shift, scale)
    out: Tensor = _run("adaln", x, (x, shift, scale, eps))
    return out


def _adaln_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    _check_adaln(x, shift, scale)
    return x.new_empty(x.shape)


def _adaln_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: str = "int8",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    _check_adaln(x, shift, scale)
    _check_columns(input_scale, x.shape[2])
    _check_activation_dtype(dtype)
    result: tuple[Tensor, Tensor] = _run("adaln_quantize", x, (x, shift, scale, input_scale, dtype, eps))
    return result


def _adaln_quantize_fake(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: str = "int8",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    _check_adaln(x, shift, scale)
    _check_columns(input_scale, x.shape[2])
    _check_activation_dtype(dtype)
    return _quantized_like(x, x.shape[0] * x.shape[1], x.shape[2], dtype)


# --- gelu -----------------------------------------------------------------------------------------------------


def _gelu_features(x: Tensor, prefix: Tensor | None, input_scale: Tensor | None, dtype: str) -> int:
    if not x.is_floating_point() or x.dim() < 1:
        raise ValueError(f"x must be a float tensor [..., features], not {x.dtype} {list(x.shape)}")
    if prefix is not None and (prefix.shape[:-1] != x.shape[:-1] or prefix.dtype != x.dtype):
        raise ValueError(
            f"prefix must be {x.dtype} of shape {[*x.shape[:-1], 'P']}, not {prefix.dtype} {list(prefix.shape)}"
        )
    features: int = x.shape[-1] + (0 if prefix is None else prefix.shape[-1])
    _check_columns(input_scale, features)
    _check_activation_dtype(dtype)
    return features


def _gelu(x: Tensor, prefix: Tensor | None = None) -> Tensor:
    _gelu_features(x, prefix, None, "int8")
    out: Tensor = _run("gelu", x, (x, prefix))
    return out


def _gelu_fake(x: Tensor, prefix: Tensor | None = None) -> Tensor:
    return x.new_empty((*x.shape[:-1], _gelu_features(x, prefix, None, "int8")))


def _gelu_quantize(
    x: Tensor, prefix: Tensor | None = None, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    _gelu_features(x, prefix, input_scale, dtype)
    result: tuple[Tensor, Tensor] = _run("gelu_quantize", x, (x, prefix, input_scale, dtype))
    return result


def _gelu_quantize_fake(
    x: Tensor, prefix: Tensor | None = None, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    features = _gelu_features(x, prefix, input_scale, dtype)
    return _quantized_like(x, x.numel() // x.shape[-1], features, dtype)


# --- attention inputs -----------------------------------------------------------------------------------------


def check_rope(args: tuple[Any, ...]) -> int:
    """Tokens in all; ValueError unless the arguments of `qk_norm_rope` fit together."""
    q, k, q_weight, k_weight, cos, sin, context_q, context_k, context_q_weight, context_k_weight, _ = args
    if q.dim() != 4 or q.shape[-1] % 2 or q.shape != k.shape or not q.is_floating_point() or q.dtype != k.dtype:
        raise ValueError(f"q and k must be alike [batch, tokens, heads, even], not {list(q.shape)} and {list(k.shape)}")
    tokens: int = q.shape[1]
    given = [t is not None for t in (context_q, context_k, context_q_weight, context_k_weight)]
    if any(given) and not all(given):
        raise ValueError("context_q, context_k and their two weights come together or not at all")
    if context_q is not None:
        for name, t in (("context_q", context_q), ("context_k", context_k)):
            if t.dim() != 4 or (t.shape[0], *t.shape[2:]) != (q.shape[0], *q.shape[2:]) or t.dtype != q.dtype:
                raise ValueError(f"{name} must be like q but for its tokens, not {t.dtype} {list(t.shape)}")
        if context_q.shape != context_k.shape:
            raise ValueError(f"context_q {list(context_q.shape)} and context_k {list(context_k.shape)} differ")
        tokens += context_q.shape[1]
    for weight in (q_weight, k_weight, context_q_weight, context_k_weight):
        if weight is not None and weight.shape != (q.shape[-1],):
            raise ValueError(f"norm weights must have shape [{q.shape[-1]}], not {list(weight.shape)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (tokens, q.shape[-1]):
            raise ValueError(f"{name} must have shape {[tokens, q.shape[-1]]}, not {list(table.shape)}")
    return tokens


def _qk_norm_rope(
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
    context = (context_q, context_k, context_q_weight, context_k_weight)
    args = (q, k, q_weight, k_weight, cos, sin, *context, eps)
    check_rope(args)
    result: tuple[Tensor, Tensor] = _run("qk_norm_rope", q, args)
    return result


def _qk_norm_rope_fake(
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
    context = (context_q, context_k, context_q_weight, context_k_weight)
    tokens = check_rope((q, k, q_weight, k_weight, cos, sin, *context, eps))
    shape = (q.shape[0], tokens, *q.shape[2:])
    return q.new_empty(shape), q.new_empty(shape)


# --- residual -----------------------------------------------------------------------------------


def _check_residual(residual: Tensor, gate: Tensor, y: Tensor) -> None:
    check_modulation(residual, gate=gate)
    if y.shape != residual.shape or not y.is_floating_point():
        raise ValueError(f"y must be a float tensor {list(residual.shape)}, not {y.dtype} {list(y.shape)}")


def _gated_residual(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    _check_residual(residual, gate, y)
    out: Tensor = _run("gated_residual", residual, (residual, gate, y))
    return out


def _gated_residual_fake(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    _check_residual(residual, gate, y)
    return residual.new_empty(residual.shape)


_CONTEXT = (
    "Tensor? context_q=None, Tensor? context_k=None, Tensor? context_q_weight=None, Tensor? context_k_weight=None"
)
_SCHEMAS: tuple[tuple[str, str, Callable[..., Any], Callable[..., Any]], ...] = (
    ("adaln", "(Tensor x, Tensor shift, Tensor scale, float eps=1e-6) -> Tensor", _adaln, _adaln_fake),
    (
        "adaln_quantize",
        "(Tensor x, Tensor shift, Tensor scale, Tensor? input_scale=None, str dtype='int8', float eps=1e-6)"
        " -> (Tensor, Tensor)",
        _adaln_quantize,
        _adaln_quantize_fake,
    ),
    ("gelu", "(Tensor x, Tensor? prefix=None) -> Tensor", _gelu, _gelu_fake),
    (
        "gelu_quantize",
        "(Tensor x, Tensor? prefix=None, Tensor? input_scale=None, str dtype='int8') -> (Tensor, Tensor)",
        _gelu_quantize,
        _gelu_quantize_fake,
    ),
    (
        "qk_norm_rope",
        f"(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, {_CONTEXT}, float eps=1e-6)"
        " -> (Tensor, Tensor)",
        _qk_norm_rope,
        _qk_norm_rope_fake,
    ),
    (
        "gated_residual",
        "(Tensor residual, Tensor gate, Tensor y) -> Tensor",
        _gated_residual,
        _gated_residual_fake,
    ),
)
for _name, _schema, _impl, _fake in _SCHEMAS:
    _LIB.define(f"{_name}{_schema}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIB.impl(_name, _impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tritflow::{_name}", _fake, lib=_LIB)

_OPS: dict[str, Any] = {name: getattr(torch.ops.tritflow, name).default for name, *_ in _SCHEMAS}


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """`layer_norm(x) * (1 + scale) + shift`, the norm without weights: what modulation does before a linear.

    Args:
        x: [B, S, K], fp32, bf16 or fp16, any strides.
        shift: [B, K].
        scale: [B, K].
        eps: of the norm.

    Returns:
        [B, S, K] in x.dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    out: Tensor = (_OPS["adaln"] if _dispatched(x, None) else _adaln)(x, shift, scale, eps)
    return out


def adaln_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: str = "int8",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """`quantize_activation(adaln(x, shift, scale), input_scale, dtype)` in one pass, without the rounding between.

    Args:
        x, shift, scale, eps: those of `adaln`.
        input_scale: [K] or None.
        dtype: `int8` or `float8_e4m3fn`.

    Returns:
        q [B * S, K] in `dtype`, scale float32 [B * S].

    Raises:
        ValueError: shapes that do not fit together, or an unknown dtype.
    """
    run = _OPS["adaln_quantize"] if _dispatched(x, None) else _adaln_quantize
    result: tuple[Tensor, Tensor] = run(x, shift, scale, input_scale, dtype, eps)
    return result


def gelu(x: Tensor, prefix: Tensor | None = None) -> Tensor:
    """`cat(prefix, gelu(x))` in one pass; GELU in its tanh form.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        prefix: [..., P] in x.dtype, put before the K features as it is (attention in a single block), or None.

    Returns:
        [..., P + K] in x.dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    out: Tensor = (_OPS["gelu"] if _dispatched(x, None) else _gelu)(x, prefix)
    return out


def gelu_quantize(
    x: Tensor, prefix: Tensor | None = None, input_scale: Tensor | None = None, dtype: str = "int8"
) -> tuple[Tensor, Tensor]:
    """`quantize_activation(cat(prefix, gelu(x)), input_scale, dtype)` in one pass; GELU in its tanh form.

    Args:
        x: [..., K], fp32, bf16 or fp16.
        prefix: [..., P] in x.dtype, put before the K features as it is (attention in a single block), or None.
        input_scale: [P + K] or None.
        dtype: `int8` or `float8_e4m3fn`.

    Returns:
        q [M, P + K] in `dtype`, scale float32 [M].

    Raises:
        ValueError: shapes that do not fit together, or an unknown dtype.
    """
    run = _OPS["gelu_quantize"] if _dispatched(x, None) else _gelu_quantize
    result: tuple[Tensor, Tensor] = run(x, prefix, input_scale, dtype)
    return result


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
    """RMS norm over each head, then rotary embedding of neighbouring pairs, of queries and keys in one pass.

    out[2i] = x[2i] cos[2i] - x[2i+1] sin[2i], out[2i+1] = x[2i+1] cos[2i+1] + x[2i] sin[2i+1].

    Args:
        q: [B, S, H, D], any strides with D contiguous.
        k: like q.
        q_weight: [D] of the norm.
        k_weight: [D] of the norm.
        cos: float32 [C + S, D].
        sin: float32 [C + S, D].
        context_q: [B, C, H, D] of the text stream, which comes first in the result; or None (C = 0).
        context_k: like context_q.
        context_q_weight: [D].
        context_k_weight: [D].
        eps: of the norm.

    Returns:
        Queries and keys, contiguous [B, C + S, H, D] in q.dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    run = _OPS["qk_norm_rope"] if _dispatched(q, None) else _qk_norm_rope
    context = (context_q, context_k, context_q_weight, context_k_weight)
    result: tuple[Tensor, Tensor] = run(q, k, q_weight, k_weight, cos, sin, *context, eps)
    return result


def gated_residual(residual: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    """`residual + gate * y`.

    Args:
        residual: [B, S, N], any strides.
        gate: [B, N].
        y: [B, S, N].

    Returns:
        [B, S, N] in residual.dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    run = _OPS["gated_residual"] if _dispatched(residual, None) else _gated_residual
    out: Tensor = run(residual, gate, y)
    return out
