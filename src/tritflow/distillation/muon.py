"""Muon for weight matrices: momentum, then an orthogonalised update, batched over equal shapes.

Source: Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024): Newton-Schulz iteration with
the published quintic coefficients; the .2 * sqrt(max(N, K)) step size that matches AdamW's is from Liu et al., "Muon is
scalable for LLM training" (2025). torch.optim.Muon takes one matrix at a time: thousands of small kernels a step here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTUM = 0.95


def orthogonalize(update: Tensor, steps: int = 5) -> Tensor:
    """Nearest semi-orthogonal matrices of a batch [B, N, K], by Newton-Schulz in bfloat16; on a CPU in float32, which
    most CPUs multiply many times as fast.
    """
    a, b, c = _COEFFICIENTS
    x = update.float() if update.device.type == "cpu" else update.bfloat16()
    transposed = x.shape[-2] > x.shape[-1]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        # a x + (b gram + c gram^2) x; the sums inside of the products, or they are five kernels more an iteration.
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if transposed else x


def direction(grad: Tensor, mean: Tensor, factor: Tensor | None) -> Tensor:
    """What the learning rate multiplies, float32 [B, N, K]: Nesterov's momentum, orthogonalised, of a size that matches
    AdamW's.

    Args:
        grad: of a batch of matrices.
        mean: its running mean, this gradient included.
        factor: [..., K], by which columns are multiplied, or None.
    """
    update = orthogonalize(torch.lerp(grad, mean, MOMENTUM)).float()
    update = update * (0.2 * max(update.shape[-2:]) ** 0.5)
    return update if factor is None else update * factor


class Muon:
    """Muon over 2-D parameters.

    Args:
        parameters: [N, K] each.
        lr: a tensor, so that a captured CUDA graph sees its changes.
        weight_decay: decoupled.
        factors: id of a parameter -> [K], by which the columns of its orthogonalised step are multiplied.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: Tensor,
        weight_decay: float = 0.0,
        factors: Mapping[int, Tensor] | None = None,
    ) -> None:
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for p in parameters:
            if p.ndim != 2:
                raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(p.shape)}")
            groups[tuple(p.shape)].append(p)
        self.groups = list(groups.values())
        self.buffers = [torch.zeros((len(g), *g[0].shape), device=g[0].device) for g in self.groups]
        self.lr, self.weight_decay = lr, weight_decay
        self.factors = [_stacked(group, factors or {}) for group in self.groups]

    def momenta(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter with its momentum, a view of what `step` uses."""
        return [
            (p, momentum)
            for group, buffer in zip(self.groups, self.buffers, strict=True)
            for p, momentum in zip(group, buffer, strict=True)
        ]

    @torch.no_grad()
    def step(self) -> None:
        """One update from the parameters' `.grad`."""
        for group, buffer, factor in zip(self.groups, self.buffers, self.factors, strict=True):
            grad = torch.stack([p.grad for p in group])  # type: ignore[misc]
            buffer.lerp_(grad, 1 - MOMENTUM)
            update = direction(grad, buffer, factor)
            if self.weight_decay:
                update = update + self.weight_decay * torch.stack(group)
            torch._foreach_sub_(group, list((update * self.lr).unbind()))


def _stacked(group: Sequence[Tensor], factors: Mapping[int, Tensor]) -> Tensor | None:
    """[B, 1, K] of a group of equal shapes; None where no factor is given."""
    if not any(id(p) in factors for p in group):
        return None
    ones = group[0].new_ones(group[0].shape[1])
    return torch.stack([factors.get(id(p), ones) for p in group])[:, None]
