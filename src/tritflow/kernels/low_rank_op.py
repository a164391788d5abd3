"""Low-rank updates beside ternary products (LoRA): `tritflow::low_rank_down`, `low_rank_add_` and `w2a16_low_rank`.

y + B (A x): `low_rank_down` computes A x from rows that were quantized for the ternary product, so that nobody has to
keep the full ones; B is added inside the product's epilogue (`low` and `up` of `w2a8_matmul` and `w2a16_low_rank`), or
by `low_rank_add_`.

Layers of one input that are one product keep factors of their own: of S layers with as many rows each, `low` holds
S groups of R columns side by side, and the layer's rows of `up` [N, R] meet their own group. S = low columns / R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.kernels import reference
from tritflow.kernels.backends import select
from tritflow.kernels.ops import _bytes, _check, _dispatched

_LIB = torch.library.Library("tritflow", "FRAGMENT")

RANK_UNIT = 16
"""R is a multiple of it: what one step of a 16-bit matrix product takes. Pad with zeros."""


def check_low_rank(low: Tensor | None, up: Tensor | None, tokens: int, rows: int, dtype: torch.dtype) -> None:
    """Raise ValueError unless low [tokens, S * R] and up [rows, R] fit together, or both are None."""
    if low is None and up is None:
        return
    if low is None or up is None:
        raise ValueError("low and up come together or not at all")
    rank = up.shape[-1] if up.dim() == 2 else 0
    if rank < 1 or rank % RANK_UNIT or up.shape[0] != rows or up.dtype != dtype:
        raise ValueError(
            f"up must be {dtype} [{rows}, R] with R a multiple of {RANK_UNIT}, not {up.dtype} {list(up.shape)}"
        )
    groups = low.shape[-1] // rank
    if low.dim() != 2 or low.shape != (tokens, groups * rank) or not groups or rows % groups or low.dtype != dtype:
        raise ValueError(
            f"low must be {dtype} [{tokens}, S * {rank}] with S a divisor of {rows} rows, "
            f"not {low.dtype} {list(low.shape)}"
        )


def _check_down(q: Tensor, x_scale: Tensor, down: Tensor) -> None:
    if q.dim() != 2 or q.dtype not in reference.QTYPE.values():
        raise ValueError(f"q must be an int8 or float8_e4m3fn matrix, not {q.dtype} {list(q.shape)}")
    if x_scale.shape != (q.shape[0],):
        raise ValueError(f"x_scale must have shape [{q.shape[0]}], not {list(x_scale.shape)}")
    if down.dim() != 2 or down.shape[1] != q.shape[1] or not down.is_floating_point():
        raise ValueError(f"down must be a float matrix [columns, {q.shape[1]}], not {down.dtype} {list(down.shape)}")


def _low_rank_down(q: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    _check_down(q, x_scale, down)
    args = (q, x_scale, down)
    out: Tensor = select("low_rank_down", "auto", q.device, args)(*args)
    return out


def _low_rank_down_fake(q: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    _check_down(q, x_scale, down)
    return down.new_empty((q.shape[0], down.shape[0]))


def _low_rank_add(y: Tensor, low: Tensor, up: Tensor) -> None:
    if y.dim() != 2 or not y.is_contiguous():
        raise ValueError(f"y must be a contiguous matrix, not {list(y.shape)} with strides {list(y.stride())}")
    check_low_rank(low, up, y.shape[0], y.shape[1], y.dtype)
    select("low_rank_add_", "auto", y.device, (y, low, up))(y, low, up)


def _low_rank_add_fake(y: Tensor, low: Tensor, up: Tensor) -> None:
    check_low_rank(low, up, y.shape[0], y.shape[1], y.dtype)


def _check_w2a16(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
) -> None:
    _check(x, weight, weight_scale, bias, input_scale)
    check_low_rank(low, up, x.numel() // x.shape[-1], weight_scale.shape[0], x.dtype)


def _w2a16_low_rank(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
    backend: str = "auto",
) -> Tensor:
    _check_w2a16(x, weight, weight_scale, bias, input_scale, low, up)
    args = (x, _bytes(weight), weight_scale, bias, input_scale, low, up)
    out: Tensor = select("w2a16_low_rank", backend, x.device, args)(*args)
    return out


def _w2a16_low_rank_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
    backend: str = "auto",
) -> Tensor:
    _check_w2a16(x, weight, weight_scale, bias, input_scale, low, up)
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]))


_LIB.define(
    "w2a16_low_rank(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, Tensor? input_scale, Tensor low,"
    " Tensor up, str backend='auto') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("w2a16_low_rank", _w2a16_low_rank, "CompositeExplicitAutograd")
torch.library.register_fake("tritflow::w2a16_low_rank", _w2a16_low_rank_fake, lib=_LIB)
_LIB.define(
    "low_rank_down(Tensor q, Tensor x_scale, Tensor down) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.define(
    "low_rank_add_(Tensor(a!) y, Tensor low, Tensor up) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIB.impl("low_rank_down", _low_rank_down, "CompositeExplicitAutograd")
_LIB.impl("low_rank_add_", _low_rank_add, "CompositeExplicitAutograd")
torch.library.register_fake("tritflow::low_rank_down", _low_rank_down_fake, lib=_LIB)
torch.library.register_fake("tritflow::low_rank_add_", _low_rank_add_fake, lib=_LIB)
_DOWN: Any = torch.ops.tritflow.low_rank_down.default
_ADD: Any = torch.ops.tritflow.low_rank_add_.default
_W2A16: Any = torch.ops.tritflow.w2a16_low_rank.default


def low_rank_down(q: Tensor, x_scale: Tensor, down: Tensor) -> Tensor:
    """`(q @ down^T) * x_scale[:, None]`: the first factor on rows that are quantized already; float32 sums.

    Args:
        q: int8 or float8_e4m3fn [M, K], as `quantize_activation` gives it.
        x_scale: float32 [M].
        down: float [C, K]. Where the rows were quantized with an `input_scale`, divide by it.

    Returns:
        [M, C] in down.dtype.

    Raises:
        ValueError: shapes that do not fit together.
    """
    out: Tensor = (_DOWN if _dispatched(q, None) else _low_rank_down)(q, x_scale, down)
    return out


def low_rank_add_(y: Tensor, low: Tensor, up: Tensor) -> None:
    """`y += low @ up^T`, in place, rounded once; groups of rows as the module describes them.

    Args:
        y: contiguous [M, N].
        low: [M, S * R] in y.dtype.
        up: [N, R] in y.dtype, R a multiple of 16.

    Raises:
        ValueError: shapes that do not fit together.
    """
    (_ADD if _dispatched(y, None) else _low_rank_add)(y, low, up)


def w2a16_low_rank(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    low: Tensor,
    up: Tensor,
    backend: str = "auto",
) -> Tensor:
    """`w2a16_linear(x, ...) + low @ up^T`; not differentiable.

    Args:
        x, weight, weight_scale, bias, input_scale, backend: as for `w2a16_linear`.
        low: [M, S * R] in x.dtype, M the product of x's leading sizes.
        up: [N, R] in x.dtype, R a multiple of 16.

    Returns:
        [..., N] in x.dtype.

    Raises:
        ValueError: shapes that do not fit together.
        BackendError: the named backend does not exist, cannot run here, or does not take these arguments.
    """
    run = _W2A16 if _dispatched(x, bias) else _w2a16_low_rank
    out: Tensor = run(x, weight, weight_scale, bias, input_scale, low, up, backend)
    return out
