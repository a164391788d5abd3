"""Muon, batched: near-orthogonal updates, and the same numbers as one matrix at a time."""

from __future__ import annotations

import pytest
import torch

from tritflow.distillation.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 24, 64), (2, 64, 24)])
def test_orthogonalize_pulls_all_singular_values_towards_one(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    update = torch.randn(shape, generator=generator)
    out = orthogonalize(update).float()
    assert out.shape == update.shape
    before, after = torch.linalg.svdvals(update), torch.linalg.svdvals(out)
    assert float((before.amax(-1) / before.amin(-1)).min()) > 2
    # The published coefficients trade exactness for speed: singular values end in about 0.7..1.2.
    assert float(after[..., : shape[1] // 2].min()) > 0.6
    assert float(after.max()) < 1.3
    # Same singular vectors: the result points where the update pointed.
    u, _, v = torch.linalg.svd(update, full_matrices=False)
    nearest = u @ v
    cosine = (out * nearest).sum((1, 2)) / (out.norm(dim=(1, 2)) * nearest.norm(dim=(1, 2)))
    assert float(cosine.min()) > 0.95


def test_scale_of_the_update_does_not_matter() -> None:
    update = torch.randn(1, 16, 40, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(orthogonalize(update).float(), orthogonalize(update * 1024).float(), atol=0.02)


def plain_muon(
    p: torch.Tensor, grads: list[torch.Tensor], lr: float, momentum: float, weight_decay: float
) -> torch.Tensor:
    """One matrix at a time, after the paper."""
    p, buffer = p.clone(), torch.zeros_like(p)
    for g in grads:
        buffer = momentum * buffer + (1 - momentum) * g
        nesterov = momentum * buffer + (1 - momentum) * g
        step = orthogonalize(nesterov[None])[0].float() * 0.2 * max(p.shape) ** 0.5
        p = p - lr * (step + weight_decay * p)
    return p


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_matches_one_matrix_at_a_time(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(2)
    shapes = [(16, 24), (24, 16), (16, 24), (8, 8)]
    starts = [torch.randn(s, generator=generator) for s in shapes]
    grads = [[torch.randn(s, generator=generator) for _ in range(4)] for s in shapes]
    parameters = [torch.nn.Parameter(s.clone()) for s in starts]
    muon = Muon(parameters, torch.tensor(0.02), weight_decay=weight_decay)
    assert len(muon.groups) == 3
    for step in range(4):
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g[step]
        muon.step()
    for p, start, g in zip(parameters, starts, grads, strict=True):
        expected = plain_muon(start, g, 0.02, 0.95, weight_decay)
        # Both go through bfloat16; the batch may round its products differently.
        assert torch.allclose(p, expected, atol=2e-3)
        assert float((expected - start).abs().max()) > 0.02


def test_vectors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"matrices, not a parameter of shape \(4,\)"):
        Muon([torch.nn.Parameter(torch.zeros(4))], torch.tensor(0.1))
