"""Parts of a fused forward that know no model family: several linears as one, and inputs that are quantized once.

A `Projection` computes what a list of linear layers computes on one input, side by side. `Rows` are such an input,
not yet computed: a projection takes it in full or quantized, and two projections that want it in the same form
share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.kernels import (
    adaln,
    adaln_quantize,
    gated_residual,
    gelu,
    gelu_quantize,
    low_rank_down,
    quantize_activation,
    w2a8_matmul,
    w2a16_linear,
    w2a16_low_rank,
)
from tritflow.models.low_rank import LowRank, Shared, base_of
from tritflow.modules import PackedWeight, TernaryLinear

Quantized = tuple[Tensor, Tensor]


class Rows:
    """An input of linear layers, [B, S, K], computed when asked for and kept in every form that was asked for.

    Args:
        x: what it is computed from.
        once: one layer alone will ask, so that what it is computed from is let go then. Activations are what the
            peak of memory is made of.
    """

    def __init__(self, x: Tensor, *, once: bool = False) -> None:
        self.batch, self.dtype, self.once = x.shape[:-1], x.dtype, once
        self._sources: tuple[Tensor | None, ...] = (x,)
        self._full: Tensor | None = None
        self._quantized: dict[tuple[str, int | None], Quantized] = {}
        self._low: dict[int, Tensor] = {}

    def full(self) -> Tensor:
        """[B, S, K] in the model's dtype."""
        if self._full is None:
            self._full = self._compute(*self._taken())
        return self._full

    def quantized(self, dtype: str, input_scale: Tensor | None) -> Quantized:
        """Per-token 8-bit rows and scales, see `tritflow.kernels.quantize_activation`."""
        key = dtype, None if input_scale is None else id(input_scale)
        if key not in self._quantized:
            self._quantized[key] = self._quantize(dtype, input_scale, *self._taken())
        return self._quantized[key]

    def low(self, shared: Shared, dtype: str, input_scale: Tensor | None) -> Tensor:
        """[B * S, columns of all members]: first factors on the quantized rows."""
        if id(shared) not in self._low:
            q, scale = self.quantized(dtype, input_scale)
            self._low[id(shared)] = low_rank_down(q, scale, shared.down(self.dtype))
        return self._low[id(shared)]

    def _taken(self) -> tuple[Any, ...]:
        sources = self._sources
        if self.once:
            self._sources = ()
        return sources

    def _compute(self, x: Tensor) -> Tensor:
        return x

    def _quantize(self, dtype: str, input_scale: Tensor | None, x: Tensor) -> Quantized:
        return quantize_activation(x, input_scale, dtype)


class Modulated(Rows):
    """Layer norm, then `* (1 + scale) + shift`.

    Args:
        x: [B, S, K].
        shift: [B, K].
        scale: [B, K].
        eps: of the norm.
        once: see `Rows`.
    """

    def __init__(self, x: Tensor, shift: Tensor, scale: Tensor, eps: float, *, once: bool = False) -> None:
        super().__init__(x, once=once)
        self.shift, self.scale, self.eps = shift, scale, eps

    def _compute(self, x: Tensor) -> Tensor:
        return adaln(x, self.shift, self.scale, self.eps)

    def _quantize(self, dtype: str, input_scale: Tensor | None, x: Tensor) -> Quantized:
        return adaln_quantize(x, self.shift, self.scale, input_scale, dtype, self.eps)


class Activated(Rows):
    """GELU (tanh form), behind features that pass as they are.

    Args:
        x: [B, S, K].
        prefix: [B, S, P] or None.
        once: see `Rows`.
    """

    def __init__(self, x: Tensor, prefix: Tensor | None = None, *, once: bool = False) -> None:
        super().__init__(x, once=once)
        self._sources = (x, prefix)

    def _compute(self, x: Tensor, prefix: Tensor | None = None) -> Tensor:
        return gelu(x, prefix)

    def _quantize(self, dtype: str, input_scale: Tensor | None, x: Tensor, prefix: Tensor | None = None) -> Quantized:
        return gelu_quantize(x, prefix, input_scale, dtype)


class _Part(Protocol):
    def __call__(self, rows: Rows, residual: Tensor | None, gate: Tensor | None) -> Tensor: ...


def _add(y: Tensor, residual: Tensor | None, gate: Tensor | None) -> Tensor:
    return y if residual is None or gate is None else gated_residual(residual, gate, y)


class _Dense:
    """A layer that is not ternary, as it is, with peft's own way of adding a LoRA to it."""

    def __init__(self, linear: nn.Module) -> None:
        self.linear = linear

    def __call__(self, rows: Rows, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        return _add(self.linear(rows.full()), residual, gate)


class _Ternary:
    """Ternary layers of one input with the same settings: rows of weights, scales and biases put below each other.

    The layers keep working: their tensors become views of the joint ones, so nothing is stored twice. LoRA adapters of
    the layers are one low-rank update of the product.

    Args:
        linears: ternary layers, or peft's layers around them.
    """

    def __init__(self, linears: Sequence[Any]) -> None:
        self.linears: tuple[TernaryLinear, ...] = tuple(base_of(linear) for linear in linears)
        first = self.linears[0]
        self.mode, self.activation_dtype, self.backend = first.mode, first.activation_dtype, first.backend
        self.input_scale = first.input_scale
        self.weight_scale = first.weight_scale
        self.bias: Tensor | None = first.bias
        self.weight: Tensor = first.weight
        if len(linears) > 1:
            self._join()
        # Full rows are what an adapter was made for; quantized ones carry the input scale.
        self.low_rank = LowRank.of(linears, self.input_scale if self.mode == "w2a8" else None)
        self.shared = None if self.low_rank is None else Shared([self.low_rank])
        # cuBLAS wants float32 scales; converting them would be a launch of its own before every product.
        self.scale = self.weight_scale.float()

    def _join(self) -> None:
        first = self.linears[0]
        packed = torch.cat([linear.packed for linear in self.linears])
        self.weight = PackedWeight(packed, False, first.in_features, first.keep_expanded)
        self.weight_scale = torch.cat([linear.weight_scale for linear in self.linears])
        self.bias = None if first.bias is None else torch.cat([_bias(linear) for linear in self.linears])
        start = 0
        for linear in self.linears:
            rows = slice(start, start + linear.out_features)
            linear.set_packed_(packed[rows])
            linear.weight_scale = self.weight_scale[rows]
            if self.bias is not None:
                linear.bias = nn.Parameter(self.bias[rows], requires_grad=False)
            start = rows.stop

    def __call__(self, rows: Rows, residual: Tensor | None, gate: Tensor | None) -> Tensor:
        if self.mode == "w2a16":
            product = (rows.full(), self.weight, self.weight_scale, self.bias, self.input_scale)
            if self.low_rank is None:
                return _add(w2a16_linear(*product, self.backend), residual, gate)
            down, up = self.low_rank.made(rows.dtype)
            low = F.linear(rows.full(), down).flatten(0, -2)
            return _add(w2a16_low_rank(*product, low, up, self.backend), residual, gate)
        q, scale = rows.quantized(self.activation_dtype, self.input_scale)
        factors: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.low_rank is not None and self.shared is not None:
            low = rows.low(self.shared, self.activation_dtype, self.input_scale)
            columns = self.shared.columns(self.low_rank, rows.dtype)
            factors = low[:, columns], self.low_rank.made(rows.dtype)[1]
        linear = (self.weight, self.scale, rows.dtype, self.bias)
        y = w2a8_matmul(q, scale, *linear, residual, gate, *factors, self.backend)
        return y.view(*rows.batch, y.shape[-1])


def _bias(linear: TernaryLinear) -> Tensor:
    assert linear.bias is not None
    return linear.bias.detach()


def _alike(a: TernaryLinear, b: TernaryLinear) -> bool:
    """Whether two layers of one input can be one: settings, and an input scale that quantizes alike."""
    same = (a.mode, a.activation_dtype, a.backend, a.in_features) == (
        b.mode,
        b.activation_dtype,
        b.backend,
        b.in_features,
    )
    if not same or (a.bias is None) != (b.bias is None) or (a.input_scale is None) != (b.input_scale is None):
        return False
    if a.bias is not None and b.bias is not None and a.bias.dtype != b.bias.dtype:
        return False
    return a.input_scale is None or b.input_scale is None or torch.equal(a.input_scale, b.input_scale)


class Projection:
    """What linear layers of one input compute, their outputs side by side.

    Neighbours that are ternary with the same settings become one product; all others stay products of their own.

    Args:
        linears: in the order of their outputs, bare or in peft's LoRA layers that `low_rank.why_not` has nothing
            against. Tensors of joined layers become views of the joint ones.
    """

    def __init__(self, *linears: nn.Module) -> None:
        runs: list[list[Any]] = []
        for linear in linears:
            base, last = base_of(linear), base_of(runs[-1][-1]) if runs else None
            if isinstance(base, TernaryLinear) and isinstance(last, TernaryLinear) and _alike(last, base):
                runs[-1].append(linear)
            else:
                runs.append([linear])
        self.parts: list[_Part] = [
            _Ternary(run) if isinstance(base_of(run[0]), TernaryLinear) else _Dense(run[0]) for run in runs
        ]

    @property
    def expanded_bytes(self) -> int:
        """Bytes that CPU kernels keep beside the packed ones at the moment, as `TernaryLinear.expanded_bytes`."""
        weights = (part.weight for part in self.parts if isinstance(part, _Ternary))
        expansions = (weight.expansion for weight in weights if isinstance(weight, PackedWeight))
        return sum(expansion.bytes for expansion in expansions if expansion is not None)

    def __call__(self, rows: Rows, residual: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """[B, S, N]; with `residual` [B, S, N] and `gate` [B, N], `residual + gate *` that.

        Raises:
            ValueError: a residual for several products.
        """
        if len(self.parts) == 1:
            return self.parts[0](rows, residual, gate)
        y = torch.cat([part(rows, None, None) for part in self.parts], dim=-1)
        return _add(y, residual, gate)


def share_low_rank_(*projections: Projection) -> None:
    """Let products of projections that take the same rows compute their adapters' first factors in one pass."""
    groups: dict[tuple[str, int | None], list[_Ternary]] = {}
    for part in (part for projection in projections for part in projection.parts):
        if isinstance(part, _Ternary) and part.low_rank is not None and part.mode == "w2a8":
            key = part.activation_dtype, None if part.input_scale is None else id(part.input_scale)
            groups.setdefault(key, []).append(part)
    for parts in groups.values():
        shared = Shared([part.low_rank for part in parts if part.low_rank is not None])
        for part in parts:
            part.shared = shared


def separate_(linear: TernaryLinear) -> None:
    """Give a layer back tensors of its own, if they are views of joint ones; values stay."""
    if linear.packed.untyped_storage().nbytes() != linear.packed.nbytes:
        linear.set_packed_(linear.packed.clone())
        linear.weight_scale = linear.weight_scale.clone()
        if linear.bias is not None:
            linear.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=False)
