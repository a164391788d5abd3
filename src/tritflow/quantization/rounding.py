"""One entry to all roundings: a weight in, everything a ternary linear stores out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tritflow.config import Ternarizer
from tritflow.quantization.ternarize import absmean, mse_optimal, mse_optimal_columns


@dataclass(frozen=True)
class Rounded:
    """W[n, k] ~= weight_scale[n] * trits[n, k] * input_scale[k].

    Attributes:
        trits: int8 [N, K].
        weight_scale: fp32 [N].
        input_scale: fp32 [K], or None.
        bias: fp32 [N] where rounding changed it, or None: the source's stays.
    """

    trits: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None = None
    bias: Tensor | None = None


def round_weight(
    weight: Tensor,
    ternarizer: Ternarizer = "mse",
    *,
    column_scale: bool = False,
    input_importance: Tensor | None = None,
    input_scale: Tensor | None = None,
) -> Rounded:
    """Round from the weight alone.

    Args:
        weight: [N, K].
        ternarizer: `absmean` or `mse`.
        column_scale: also fit a scale per column (`mse` only).
        input_importance: [K], see `mse_optimal` (`mse` only).
        input_scale: [K], column scales to round under instead of fitting them (`mse` only).

    Raises:
        ValueError: column scales or importances with absmean; see `mse_optimal` for the rest.
    """
    if ternarizer == "absmean":
        if column_scale or input_importance is not None or input_scale is not None:
            raise ValueError("absmean has no column scales and no importances; use the mse ternarizer")
        return Rounded(*absmean(weight))
    if input_scale is not None:
        c = input_scale.to(weight.device, torch.float32)
        importance = c.square() if input_importance is None else c.square() * input_importance.to(c)
        return Rounded(*mse_optimal(weight.float() / c, importance), c)
    if column_scale:
        trits, scale, column = mse_optimal_columns(weight, input_importance)
        return Rounded(trits, scale, column)
    return Rounded(*mse_optimal(weight, input_importance))
