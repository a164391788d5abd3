"""Round a weight matrix to W[n, k] ~= weight_scale[n] * T[n, k] (* input_scale[k]), T in {-1, 0, +1}.

Every function works on chunks of rows, so that scratch memory is a few chunks and never a second matrix.
Weights may be of any floating type; arithmetic is fp32. Scales come back as fp32 [N], trits as int8 [N, K].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# 16 MiB of fp32 a temporary: sorting needs some ten times that at once, fp64 sums and indices included.
CHUNK_ELEMENTS = 1 << 22


def absmean(weight: Tensor) -> tuple[Tensor, Tensor]:
    """BitNet b1.58 rounding (arXiv 2402.17764, eq. 1-3), with the mean taken per row.

    Args:
        weight: [N, K], any floating dtype.

    Returns:
        trits int8 [N, K] = clamp(round(w / scale)), scale fp32 [N] = mean_k |w|. A row of zeros has scale 0.

    Raises:
        ValueError: `weight` is not a matrix or holds NaN or infinity.
    """
    _check(weight)
    trits, scale = _outputs(weight)
    for rows in _chunks(weight):
        w = weight[rows].float()
        s = _finite(w.abs().mean(dim=1))
        scale[rows] = s
        trits[rows] = round_to_trits(w, s)
    return trits, scale


def mse_optimal(weight: Tensor, input_importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The exact minimiser, row by row, of sum_k h[k] * (w[k] - s * t[k])^2 over s and t.

    For a given s the best t keeps the entries with |w| > s / 2, whatever h is, so the optimum is one of the K
    "keep the m largest" solutions, with error sum h w^2 - (sum_top h |w|)^2 / sum_top h. Sorting |w| once and
    taking the best m is therefore exact, with or without importances.

    Args:
        weight: [N, K], any floating dtype.
        input_importance: [K], non-negative, e.g. the mean square of each input; None: all one.

    Returns:
        trits int8 [N, K], scale fp32 [N].

    Raises:
        ValueError: wrong shapes, negative importances, NaN or infinity.
    """
    _check(weight)
    importance = _check_importance(input_importance, weight)
    trits, scale = _outputs(weight)
    for rows in _chunks(weight):
        w = weight[rows].float()
        magnitude, order = w.abs().sort(dim=1, descending=True)
        _finite(magnitude[:, 0])
        # fp64 sums: K = 15360 fp32 terms would blur which m is best.
        if importance is None:
            mass = torch.arange(1, w.shape[1] + 1, device=w.device, dtype=torch.float64)
            kept = magnitude.double().cumsum(dim=1)
        else:
            h = importance[order].double()
            mass = h.cumsum(dim=1)
            kept = (h * magnitude).cumsum(dim=1)
        gain = kept.square() / mass.clamp_min(torch.finfo(torch.float64).tiny)
        best = gain.argmax(dim=1, keepdim=True)
        threshold = magnitude.gather(1, best)
        t = torch.where(w.abs() >= threshold, w.sign(), torch.zeros_like(w))
        trits[rows] = t.to(torch.int8)
        scale[rows] = _fit_scale(w, t, importance)
    return trits, scale


def mse_optimal_columns(
    weight: Tensor, input_importance: Tensor | None = None, rounds: int = 6
) -> tuple[Tensor, Tensor, Tensor]:
    """`mse_optimal` with a scale per column as well, by alternating least squares.

    With the columns fixed, the rows are an exact `mse_optimal` of w / c with importance h * c^2; with rows
    and trits fixed, each column is a closed-form least squares. Neither half step can raise the error.

    Returns:
        trits int8 [N, K], weight_scale fp32 [N], input_scale fp32 [K], the latter with geometric mean 1.
    """
    _check(weight)
    importance = _check_importance(input_importance, weight)
    base = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance
    plain = (*mse_optimal(weight, importance), torch.ones_like(base))
    energy = torch.zeros_like(base)
    for rows in _chunks(weight):
        energy += weight[rows].float().square().sum(dim=0)
    # Columns start at their own size: from all ones, small columns would round to zero and stay there.
    column = _unit(energy.sqrt())
    trits, scale = mse_optimal(weight.float() / column, base * column.square())
    for _ in range(rounds):
        upper = torch.zeros_like(column)
        lower = torch.zeros_like(column)
        for rows in _chunks(weight):
            q = trits[rows].float() * scale[rows, None]
            upper += (weight[rows].float() * q).sum(dim=0)
            lower += q.square().sum(dim=0)
        column = _unit(torch.where(lower > 0, upper / lower.clamp_min(1e-30), column))
        trits, scale = mse_optimal(weight.float() / column, base * column.square())
    found = (trits, scale, column)
    return min(found, plain, key=lambda q: weighted_error(weight, *q, importance=importance))


def weighted_error(
    weight: Tensor,
    trits: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
    *,
    importance: Tensor | None = None,
) -> float:
    """sum_nk h[k] * (w - q)^2, h = `importance` or all one."""
    total = 0.0
    for rows in _chunks(weight):
        e = (weight[rows].float() - dequantize(trits[rows], weight_scale[rows], input_scale)).square()
        total += float((e if importance is None else e * importance).sum())
    return total


def round_to_trits(weight: Tensor, scale: Tensor) -> Tensor:
    """int8 clamp(round(w / scale)) with scale [N]; rows of scale 0 become 0."""
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    trits = (weight.float() / safe[:, None]).round().clamp_(-1, 1)
    return trits.mul_((scale > 0)[:, None]).to(torch.int8)


def dequantize(trits: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """fp32 [N, K] = weight_scale[:, None] * trits * input_scale."""
    weight = trits.float() * weight_scale.float()[:, None]
    return weight if input_scale is None else weight * input_scale.float()


def signal_to_noise(weight: Tensor, trits: Tensor, weight_scale: Tensor, input_scale: Tensor | None = None) -> float:
    """10 log10(sum w^2 / sum (w - q)^2) in dB, infinite for an exact reproduction."""
    signal = sum(float(weight[rows].float().square().sum()) for rows in _chunks(weight))
    noise = weighted_error(weight, trits, weight_scale, input_scale)
    if noise == 0.0:
        return float("inf")
    return 10.0 * math.log10(signal / noise) if signal else -float("inf")


def _unit(column: Tensor) -> Tensor:
    """Scaled to geometric mean 1, with a floor so that dead columns divide nothing by zero."""
    column = column.clamp_min(1e-4 * float(column.mean()) + 1e-30)
    return column / column.log().mean().exp()


def _fit_scale(weight: Tensor, trits: Tensor, importance: Tensor | None) -> Tensor:
    weighted = trits if importance is None else trits * importance
    upper = (weighted.double() * weight).sum(dim=1)
    lower = (weighted.double() * trits).sum(dim=1)
    return torch.where(lower > 0, upper / lower.clamp_min(1e-300), torch.zeros_like(upper)).float()


def _outputs(weight: Tensor) -> tuple[Tensor, Tensor]:
    trits = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    return trits, torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)


def _chunks(weight: Tensor) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    return [slice(i, min(i + step, weight.shape[0])) for i in range(0, weight.shape[0], step)]


def _check(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point() or weight.numel() == 0:
        raise ValueError(f"ternarizing needs a floating-point matrix [N, K], got {weight.dtype} {list(weight.shape)}")


def _check_importance(importance: Tensor | None, weight: Tensor) -> Tensor | None:
    if importance is None:
        return None
    if importance.shape != (weight.shape[1],):
        raise ValueError(f"input_importance must have shape [{weight.shape[1]}], got {list(importance.shape)}")
    importance = importance.to(weight.device, torch.float32)
    if not bool(torch.isfinite(importance).all()) or bool((importance < 0).any()):
        raise ValueError("input_importance must be finite and not negative")
    # Inputs that were never seen still need a trit: a floor keeps their weights from being free.
    return importance.clamp_min(1e-6 * float(importance.mean()) + 1e-30)


def _finite(values: Tensor) -> Tensor:
    if not bool(torch.isfinite(values).all()):
        raise ValueError("the weight holds NaN or infinity: the source checkpoint is damaged or overflowed")
    return values
