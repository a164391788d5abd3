"""Column scales that share out outliers between activations and weights, after SmoothQuant (arXiv 2211.10438).

A channel that is tens of times larger than the others takes all levels of an 8-bit token for itself. SmoothQuant
(its eq. 4) divides it, and multiplies its weights, by

    s[k] = max |x[k]|^a / max_n |W[n, k]|^(1 - a)

and folds s into the layer before. Here c = 1 / s is the format's `input_scale`, which the activation-quantize step
multiplies in anyway, so it costs nothing behind a GELU or an attention either. The size of a column of weights is
taken after its rows were balanced: ternary rows have scales of their own, and one large row would decide it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Rows and columns in turn: what is left after these rounds is far below bf16's rounding.
ROUNDS = 12
# Channels that calibration hardly saw, or that hardly matter, must not get factors without bound.
FLOOR = 1e-3


def smoothing_scale(weight: Tensor, input_amax: Tensor, exponent: float, outliers: float = 0.0) -> Tensor:
    """The `input_scale` c of a linear: W[n, k] ~= weight_scale[n] * trits[n, k] * c[k], inputs times c.

    Rescaling input channel k by r and its weights by 1 / r changes c[k] by 1 / r, whatever the exponent, and
    rescaling output rows changes nothing: what activations and ternary weights are rounded from stays the same
    (tests hold that), up to the floor.

    Args:
        weight: [N, K], any floating dtype.
        input_amax: [K], the largest magnitude of each input channel over calibration.
        exponent: a, from 0 (weights alone: all columns equally large) to 1 (activations alone).
        outliers: only channels at least so many times as large as the layer's median channel get a scale, all others
            exactly 1 (0: every channel gets one).

    Returns:
        fp32 [K]; geometric mean 1, with `outliers` over those that are none.

    Raises:
        ValueError: shapes that do not fit, ranges that are not finite, or an exponent outside [0, 1].
    """
    if weight.ndim != 2 or input_amax.shape != (weight.shape[1],):
        raise ValueError(f"a weight {list(weight.shape)} needs ranges [K], not {list(input_amax.shape)}")
    if not 0.0 <= exponent <= 1.0:
        raise ValueError(f"the smoothing exponent must lie in [0, 1], not {exponent}")
    if outliers and outliers <= 1.0:
        raise ValueError(f"outliers are larger than the median: the ratio must be above 1 (or 0), not {outliers}")
    amax = input_amax.to(weight.device, torch.float32)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("input ranges hold NaN or infinity: the calibration activations overflowed")
    weights = _log(column_sizes(weight))
    c = (1.0 - exponent) * weights - exponent * _log(amax)
    if not outliers:
        return (c - c.mean()).exp()
    size = _log(amax)
    large = size >= size.median() + math.log(outliers)
    return torch.where(large, c - c[~large].mean(), torch.zeros_like(c)).exp()


def column_sizes(weight: Tensor) -> Tensor:
    """fp32 [K]: root mean square of each column once every row is balanced to one size, and rows again to that.

    The fixed point (Sinkhorn and Knopp, 1967) is W[n, k] = r[n] B[n, k] c[k] with all rows and columns of B of one
    root mean square; c is returned, with any factor in common.
    """
    squares = weight.float().square()
    columns = squares.new_ones(squares.shape[1])
    tiny = torch.finfo(torch.float32).tiny
    for _ in range(ROUNDS):
        rows = (squares / columns).mean(dim=1, keepdim=True)
        inverse = torch.where(rows > tiny, 1.0 / rows.clamp_min(tiny), torch.zeros_like(rows))
        columns = (squares * inverse).mean(dim=0)
        columns = columns / columns.mean().clamp_min(tiny)
        columns = columns.clamp_min(1e-12)
    return columns.sqrt()


def _log(size: Tensor) -> Tensor:
    """Logarithm with a floor far below the middle of the channels; zero where there is nothing at all."""
    median = size[size > 0].median() if bool((size > 0).any()) else size.new_ones(())
    return size.clamp_min(FLOOR * float(median)).log()
