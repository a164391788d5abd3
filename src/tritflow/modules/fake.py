"""The training twin of a ternary layer: float weights behind, ternary function in front."""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.config import ActivationDtype
from tritflow.kernels.reference import AMAX_FLOOR, QMAX
from tritflow.modules.ternary_linear import TernaryLinear

_EDGE = 0.45  # how far a latent may start from its trit; the rounding threshold is at .5


class FakeTernaryLinear(nn.Module):
    """Computes what `to_ternary()` will compute, from a latent float32 weight that takes gradients.

    T = clamp(round(weight), -1, 1), s = bf16(exp(log_weight_scale)), c = bf16(exp(log_input_scale)),
    y = (x * c) @ (s * T)^T + bias. Rounding passes gradients straight through (Bengio et al., 2013; BitNet b1.58), and
    scales receive their true gradient at fixed trits. The latent weight is counted in trits, so that one learning rate
    is the same thing in every layer and row, and scales can move without moving trits. Both scales are rounded to the
    format's bf16 here already: converting changes nothing.

    With `activation_bits=8` activations are quantized per token as `tritflow.kernels.quantize_activation` does;
    `activation_bits` may be changed between steps.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        column_scale: whether there is an input scale a column (`log_input_scale`, a parameter).
        activation_bits: 16 (off) or 8.
        activation_dtype: of 8-bit activations.
        latent_dtype: of the latent weight; bf16 halves it, for optimisers that round by chance; int8 holds trits that
            stand still, while scales and bias are trained around them.
        device: of all tensors.

    Raises:
        ValueError: `activation_bits` is neither 8 nor 16.
    """

    log_input_scale: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        column_scale: bool = False,
        activation_bits: int = 16,
        activation_dtype: ActivationDtype = "int8",
        latent_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if activation_bits not in (8, 16):
            raise ValueError(f"activation_bits must be 8 or 16, not {activation_bits}")
        if activation_dtype not in QMAX:
            raise ValueError(f"activation_dtype '{activation_dtype}' is not one of {', '.join(QMAX)}")
        self.in_features, self.out_features = in_features, out_features
        self.activation_bits: int = activation_bits
        self.activation_dtype: ActivationDtype = activation_dtype
        latent = torch.zeros(out_features, in_features, dtype=latent_dtype, device=device)
        self.weight = nn.Parameter(latent, requires_grad=latent_dtype.is_floating_point)
        self.log_weight_scale = nn.Parameter(torch.zeros(out_features, device=device))
        self.log_input_scale = nn.Parameter(torch.zeros(in_features, device=device)) if column_scale else None
        self.bias = nn.Parameter(torch.zeros(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        trits: Tensor | None = None,
        **kwargs: Any,
    ) -> Self:
        """A twin that starts from a dense layer and its first scales.

        Args:
            linear: gives latent weight, divided by its scales, and bias (copied). Of int8 latents its weight is not
                looked at, and may be on the meta device.
            weight_scale: positive [N].
            input_scale: positive [K] or None.
            trits: int8 [N, K] to start from, where they are not simply the nearest ones (after error compensation):
                latents on the wrong side of a threshold start just inside of the right one.
            **kwargs: `activation_bits`, `activation_dtype`, `latent_dtype`, and `device` (default: the layer's).

        Raises:
            ValueError: int8 latents without trits.
        """
        kwargs = {"device": linear.weight.device, **kwargs}
        self = cls(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            column_scale=input_scale is not None,
            **kwargs,
        )
        if not self.moves and trits is None:
            raise ValueError("trits that stand still have to be given")
        with torch.no_grad():
            # A row of zeros has scale 0, whose logarithm would be lost to training; any scale gives it trits of 0.
            self.log_weight_scale.copy_(weight_scale.float().clamp_min(1e-8).log())
            if self.log_input_scale is not None and input_scale is not None:
                self.log_input_scale.copy_(input_scale.float().clamp_min(1e-8).log())
            if self.bias is not None:
                self.bias.copy_(linear.bias)
            if not self.moves:
                assert trits is not None
                self.weight.copy_(trits)
                return self
            rows, columns = self.scales()
            self.weight.copy_(linear.weight / rows[:, None])
            if columns is not None:
                self.weight.div_(columns)
            if trits is not None:
                low = torch.where(trits < 0, -torch.inf, trits - _EDGE)
                high = torch.where(trits > 0, torch.inf, trits + _EDGE)
                self.weight.copy_(torch.minimum(torch.maximum(self.weight, low), high))
        return self

    def scales(self) -> tuple[Tensor, Tensor | None]:
        """(weight_scale [N], input_scale [K] or None), float32 holding bf16 values, differentiable."""
        rows = _through(self.log_weight_scale.float().exp(), _bf16)
        if self.log_input_scale is None:
            return rows, None
        # Logarithms for columns too: outliers' scales are tens of times smaller than the rest.
        return rows, _through(self.log_input_scale.float().exp(), _bf16)

    def trits(self) -> Tensor:
        """int8 [N, K], those that the forward pass uses."""
        return _ternary(self.weight.detach()).to(torch.int8) if self.moves else self.weight.detach()

    @property
    def moves(self) -> bool:
        """Whether its trits can be trained."""
        return self.weight.is_floating_point()

    @property
    def plain(self) -> bool:
        """Whether it is `F.linear` of `effective_weight` and no more: no column scales, activations as they are."""
        return self.activation_bits == 16 and self.log_input_scale is None

    def effective_weight(self) -> Tensor:
        """s * T, float32 [N, K], differentiable."""
        trits = _through(self.weight, _ternary) if self.moves else self.weight
        return self.scales()[0][:, None] * trits

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] to [..., N] in the dtype that `F.linear` gives (x.dtype, or autocast's)."""
        _, columns = self.scales()
        weight = self.effective_weight()
        bias = None if self.bias is None else self.bias.to(x.dtype)
        scaled = x if columns is None else x.float() * columns
        if self.activation_bits == 16:
            return F.linear(scaled.to(x.dtype), weight.to(x.dtype), bias)
        q, scale = self._quantize(scaled)
        # The 8-bit values are exact in bf16; multiplied by their scale they would not be.
        out = F.linear(q.to(x.dtype), weight.to(x.dtype)).float() * scale
        return (out if bias is None else out + bias.float()).to(x.dtype)

    def _quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows as 8-bit values in float32 (straight-through) and their scales [..., 1] (no gradient)."""
        qmax = QMAX[self.activation_dtype]
        values = x.float()
        amax = values.detach().abs().amax(dim=-1, keepdim=True).clamp_min(AMAX_FLOOR)
        values = values * (torch.full_like(amax, qmax) / amax)
        if self.activation_dtype == "int8":
            return _through(values, torch.round), amax / qmax
        return _through(values, _e4m3), amax / qmax

    @torch.no_grad()
    def to_ternary(self, **kwargs: Any) -> TernaryLinear:
        """The packed layer that computes the same; 8-bit activations give mode `w2a8`.

        Args:
            **kwargs: for `TernaryLinear` (`mode`, `activation_dtype`, `backend`, `keep_expanded`).
        """
        rows, columns = self.scales()
        settings: dict[str, Any] = {
            "mode": "w2a8" if self.activation_bits == 8 else "w2a16",
            "activation_dtype": self.activation_dtype,
        }
        ternary = TernaryLinear.from_linear(self, self.trits(), rows, columns, **(settings | kwargs))  # type: ignore[arg-type]
        return ternary.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"column_scale={self.log_input_scale is not None}, activation_bits={self.activation_bits}"
        )


def _through(x: Tensor, rounding: Any) -> Tensor:
    """rounding(x) with the gradient of x. `x - x.detach()` is exactly 0, so the value is exactly the rounded one."""
    return rounding(x.detach()) + (x - x.detach())


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16).float()


def _ternary(x: Tensor) -> Tensor:
    return x.round().clamp(-1, 1)


def _e4m3(x: Tensor) -> Tensor:
    return x.to(torch.float8_e4m3fn).float()
