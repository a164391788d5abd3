"""Ternary rounding that minimises the error of the layer's output instead of the error of its weights.

Given the second moment H = E[x x^T] of a layer's inputs, the error of its outputs is tr((W - Q) H (W - Q)^T).
GPTQ (arXiv 2210.17323, algorithm 1) rounds column after column and pushes what is lost onto the columns that
are still to be rounded. Two closed steps follow that a fixed integer grid does not have: the row scale is
fitted again by least squares under H, and sweeps of exact coordinate descent let every trit move once more.
Neither can raise the error.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tritflow.quantization.ternarize import mse_optimal

BLOCK = 64


@dataclass
class InputStatistics:
    """Running moments of a linear's inputs, kept in fp32 on the device of the first batch.

    Attributes:
        second: sum of x x^T, [K, K].
        total: sum of x, [K].
        count: how many inputs (tokens) were added.
    """

    second: Tensor
    total: Tensor
    count: int = 0

    @classmethod
    def empty(cls, in_features: int, device: torch.device | str = "cpu") -> InputStatistics:
        """No inputs yet. Needs 4 * K^2 bytes on `device`."""
        return cls(torch.zeros(in_features, in_features, device=device), torch.zeros(in_features, device=device))

    def add(self, x: Tensor) -> None:
        """Add inputs of shape [..., K], any floating dtype."""
        x = x.detach().reshape(-1, x.shape[-1]).float()
        self.second.addmm_(x.T, x)
        self.total.add_(x.sum(dim=0))
        self.count += x.shape[0]

    @property
    def mean(self) -> Tensor:
        """E[x], [K]."""
        return self.total / max(1, self.count)

    def hessian(self, centered: bool = False) -> Tensor:
        """E[x x^T], or the covariance if `centered`: the right one when the bias takes up the mean error."""
        moment = self.second / max(1, self.count)
        return moment - torch.outer(self.mean, self.mean) if centered else moment


def compensate(
    weight: Tensor,
    hessian: Tensor,
    *,
    input_scale: Tensor | None = None,
    damping: float = 0.01,
    act_order: bool = True,
    sweeps: int = 6,
    block_size: int = BLOCK,
) -> tuple[Tensor, Tensor]:
    """Error-compensated ternary rows.

    Args:
        weight: [N, K], any floating dtype.
        hessian: [K, K] = E[x x^T], symmetric, positive semi-definite.
        input_scale: [K], fixed column scales c of W ~= s T c; folded into weight and Hessian.
        damping: share of the mean diagonal added to the diagonal; grows tenfold where Cholesky still fails.
        act_order: round the columns with the largest inputs first.
        sweeps: coordinate-descent passes after the GPTQ pass, each with a new scale.
        block_size: columns whose updates are gathered into one matrix product.

    Returns:
        trits int8 [N, K], scale fp32 [N]. Never worse under the damped Hessian than `mse_optimal` with the
        Hessian's diagonal as importance: where compensation loses, a row keeps that.

    Raises:
        ValueError: wrong shapes, a Hessian with NaN, or one that no damping makes positive definite.
    """
    n, k = weight.shape
    if hessian.shape != (k, k):
        raise ValueError(f"hessian must be [{k}, {k}] for a weight [{n}, {k}], got {list(hessian.shape)}")
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError("the Hessian holds NaN or infinity: the calibration activations overflowed")
    w = weight.float()
    h = hessian.to(w.device, torch.float32)
    if input_scale is not None:
        c = input_scale.to(w.device, torch.float32)
        w = w / c
        h = h * c[:, None] * c[None, :]
    seen = float(h.diagonal().mean())
    if seen <= 0:
        return mse_optimal(w)
    # Inputs that calibration never saw carry no error; the damping below still ties them to their weights.
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(k, device=w.device)
    w, h = w[:, order], h[order][:, order]
    upper, h = inverse_factor(h, damping * seen)
    start_trits, start_scale = mse_optimal(w, h.diagonal())
    trits = _gptq(w, upper, start_scale, block_size)
    scale, error = _refit(w, trits, h)
    for _ in range(sweeps):
        trits = _descend(w, trits, scale, h, block_size)
        scale, error = _refit(w, trits, h)
    start_scale, start_error = _refit(w, start_trits, h)
    worse = error > start_error
    trits = torch.where(worse[:, None], start_trits, trits)[:, order.argsort()]
    return trits, torch.where(worse, start_scale, scale)


def output_error(
    weight: Tensor,
    hessian: Tensor,
    trits: Tensor,
    weight_scale: Tensor,
    input_scale: Tensor | None = None,
) -> Tensor:
    """Relative output error tr(E H E^T) / tr(W H W^T) with E = W - Q, as a scalar fp32 tensor."""
    w = weight.float()
    q = trits.float() * weight_scale.float()[:, None]
    if input_scale is not None:
        q = q * input_scale.float()
    e = w - q
    return ((e @ hessian) * e).sum() / ((w @ hessian) * w).sum().clamp_min(1e-30)


def bias_correction(
    weight: Tensor, trits: Tensor, weight_scale: Tensor, mean: Tensor, input_scale: Tensor | None = None
) -> Tensor:
    """[N]: what to add to the bias so that the mean output over the calibration inputs stays what it was."""
    q = trits.float() * weight_scale.float()[:, None]
    if input_scale is not None:
        q = q * input_scale.float()
    return (weight.float() - q) @ mean.to(weight.device, torch.float32)


def inverse_factor(h: Tensor, step: float) -> tuple[Tensor, Tensor]:
    """Upper Cholesky factor of the inverse of the damped Hessian, and that Hessian."""
    for attempt in range(4):
        damped = h + torch.eye(h.shape[0], device=h.device) * (step * 10**attempt)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed) and bool(torch.isfinite(upper).all()):
                return upper, damped
    raise ValueError("the Hessian is not positive semi-definite, whatever the damping: calibrate again")


def _gptq(weight: Tensor, upper: Tensor, scale: Tensor, block_size: int) -> Tensor:
    """Algorithm 1 of GPTQ on a ternary grid with a fixed scale a row; int8 [N, K]."""
    w_KN = weight.T.contiguous()  # columns of W side by side in memory: each step touches one
    trits_KN = torch.empty_like(w_KN, dtype=torch.int8)
    inverse = _reciprocal(scale)
    pivots = upper.diagonal().tolist()
    for start in range(0, len(w_KN), block_size):
        stop = min(start + block_size, len(w_KN))
        lost_BN = torch.empty_like(w_KN[start:stop])
        for i in range(start, stop):
            t = (w_KN[i] * inverse).round_().clamp_(-1, 1)
            trits_KN[i] = t
            e = torch.addcmul(w_KN[i], t, scale, value=-1, out=lost_BN[i - start])
            e.div_(pivots[i])
            w_KN[i:stop].addr_(upper[i, i:stop], e, alpha=-1)
        w_KN[stop:].addmm_(upper[start:stop, stop:].T, lost_BN, alpha=-1)
    return trits_KN.T.contiguous()


def _refit(weight: Tensor, trits: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale of each row under H, and the row's error; both fp32 [N]."""
    t = trits.float()
    th = t @ h
    cross = (th * weight).sum(dim=1)
    norm = (th * t).sum(dim=1)
    scale = torch.where(norm > 0, cross / norm.clamp_min(1e-30), torch.zeros_like(cross)).clamp_min(0.0)
    e = weight - scale[:, None] * t
    return scale, ((e @ h) * e).sum(dim=1)


def _descend(weight: Tensor, trits: Tensor, scale: Tensor, h: Tensor, block_size: int) -> Tensor:
    """One sweep of exact coordinate descent on min (w - s t) H (w - s t)^T, all rows side by side.

    With g = (w - s t) H / s, moving column k alone makes t_k = round(t_k + g_k / H_kk), clamped, optimal.
    """
    inverse = _reciprocal(scale)
    t_KN = trits.T.float().contiguous()
    g_KN = h @ (weight.T * inverse - t_KN * (inverse > 0))
    diagonal = h.diagonal().tolist()
    for start in range(0, len(t_KN), block_size):
        stop = min(start + block_size, len(t_KN))
        moved_BN = torch.empty_like(t_KN[start:stop])
        for i in range(start, stop):
            t = torch.add(t_KN[i], g_KN[i], alpha=1.0 / diagonal[i]).round_().clamp_(-1, 1)
            change = torch.sub(t, t_KN[i], out=moved_BN[i - start])
            t_KN[i] = t
            g_KN[i:stop].addr_(h[i, i:stop], change, alpha=-1)
        g_KN[stop:].addmm_(h[start:stop, stop:].T, moved_BN, alpha=-1)
    return t_KN.T.to(torch.int8).contiguous()


def _reciprocal(scale: Tensor) -> Tensor:
    """1 / scale, and 0 for rows of zeros, whose trits then stay 0."""
    return torch.where(scale > 0, 1.0 / scale.clamp_min(1e-30), torch.zeros_like(scale))
