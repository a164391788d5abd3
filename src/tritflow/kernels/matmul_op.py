"""The W2A8 product alone, on activations that are quantized already: `tritflow::w2a8_matmul`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.formats.packing import packed_width
from tritflow.kernels import reference
from tritflow.kernels.backends import select
from tritflow.kernels.block_ops import check_modulation
from tritflow.kernels.low_rank_op import check_low_rank
from tritflow.kernels.ops import _bytes, _dispatched, _size

_LIB = torch.library.Library("tritflow", "FRAGMENT")


def _check_matmul(
    q: Tensor,
    x_scale: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    dtype: torch.dtype,
    bias: Tensor | None,
    residual: Tensor | None,
    gate: Tensor | None,
    low: Tensor | None,
    up: Tensor | None,
) -> None:
    rows, width = _size(weight)
    if q.dim() != 2 or q.dtype not in reference.QTYPE.values():
        raise ValueError(f"q must be an int8 or float8_e4m3fn matrix, not {q.dtype} {list(q.shape)}")
    if weight.dtype != torch.uint8 or width != packed_width(q.shape[1]):
        raise ValueError(
            f"a weight for {q.shape[1]} input features is uint8 [N, {packed_width(q.shape[1])}] packed two bits a "
            f"trit, not {weight.dtype} [{rows}, {width}]"
        )
    for name, vector, length in (
        ("x_scale", x_scale, q.shape[0]),
        ("weight_scale", weight_scale, rows),
        ("bias", bias, rows),
    ):
        if vector is not None and vector.shape != (length,):
            raise ValueError(f"{name} must have shape [{length}], not {list(vector.shape)}")
    if (residual is None) != (gate is None):
        raise ValueError("residual and gate come together or not at all")
    if residual is not None and gate is not None:
        check_modulation(residual, gate=gate)
        tokens = residual.shape[0] * residual.shape[1]
        if (tokens, residual.shape[2]) != (q.shape[0], rows) or residual.dtype != dtype:
            raise ValueError(
                f"residual must be {dtype} with {q.shape[0]} tokens of {rows} features, "
                f"not {residual.dtype} {list(residual.shape)}"
            )
    check_low_rank(low, up, q.shape[0], rows, dtype)


def _w2a8_matmul(
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
    backend: str = "auto",
) -> Tensor:
    _check_matmul(q, x_scale, weight, weight_scale, dtype, bias, residual, gate, low, up)
    args = (q, x_scale, _bytes(weight), weight_scale, dtype, bias, residual, gate, low, up)
    out: Tensor = select("w2a8_matmul", backend, q.device, args)(*args)
    return out


def _w2a8_matmul_fake(
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
    backend: str = "auto",
) -> Tensor:
    _check_matmul(q, x_scale, weight, weight_scale, dtype, bias, residual, gate, low, up)
    return q.new_empty((q.shape[0], weight_scale.shape[0]), dtype=dtype)


_LIB.define(
    "w2a8_matmul(Tensor q, Tensor x_scale, Tensor weight, Tensor weight_scale, ScalarType dtype, Tensor? bias=None,"
    " Tensor? residual=None, Tensor? gate=None, Tensor? low=None, Tensor? up=None, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("w2a8_matmul", _w2a8_matmul, "CompositeExplicitAutograd")
torch.library.register_fake("tritflow::w2a8_matmul", _w2a8_matmul_fake, lib=_LIB)
_OP: Any = torch.ops.tritflow.w2a8_matmul.default


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
    backend: str = "auto",
) -> Tensor:
    """`(q @ T^T) * weight_scale * x_scale + bias` on activations that are quantized already; exact sums for int8.

    With `low` and `up` that plus `low @ up^T`, see `low_rank_op`; with `residual` and `gate` the result is
    `residual + gate * that`.

    Args:
        q: int8 or float8_e4m3fn [M, K], as `quantize_activation` gives it.
        x_scale: float32 [M].
        weight: uint8 [N, 32 * ceil(K / 128)], `formats.packing.pack_2bit`.
        weight_scale: [N], any float type.
        dtype: of the result.
        bias: [N] or None.
        residual: [B, S, N] in `dtype` with B * S = M, or None.
        gate: [B, N]; together with `residual`.
        low: [M, S * R] in `dtype`, or None.
        up: [N, R] in `dtype`, R a multiple of 16; together with `low`.
        backend: see `tritflow.kernels.w2a16_linear`, and `scratch`.

    Returns:
        [M, N] in `dtype`.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: the named backend does not exist, cannot run here, or does not take these arguments.
    """
    run = _OP if _dispatched(q, None) else _w2a8_matmul
    out: Tensor = run(q, x_scale, weight, weight_scale, dtype, bias, residual, gate, low, up, backend)
    return out
