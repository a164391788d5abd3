"""The trainer on toys: it learns, averages, keeps its schedule and survives a bad gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from tritflow.training.loop import Trainer, rank, world_size


def toy(muon: bool, **options) -> tuple[nn.Module, Trainer]:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 4))
    target = torch.randn(4, 8)
    x = torch.randn(256, 8)
    y = torch.tanh(x @ target.T)
    matrices = [model[0].weight, model[2].weight] if muon else []
    trainer = Trainer(
        lambda: (model(x) - y).square().mean(), list(model.parameters()), matrices=matrices, peak=0.02, **options
    )
    return model, trainer


@pytest.mark.parametrize("muon", [False, True])
def test_the_loss_falls(muon: bool) -> None:
    _, trainer = toy(muon)
    before = float(trainer.loss_function().detach())
    trainer.set_rate(1.0)
    for _ in range(60):
        trainer.step()
    assert float(trainer.loss_function().detach()) < 0.2 * before
    assert trainer.steps == 60


def test_a_rate_of_nothing_changes_nothing() -> None:
    model, trainer = toy(True)
    before = [p.detach().clone() for p in model.parameters()]
    trainer.set_rate(0.0)
    trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_average_is_the_exponential_mean_of_the_weights() -> None:
    model, trainer = toy(False, ema=0.9)
    expected = [p.detach().clone() for p in model.parameters()]
    trainer.set_rate(1.0)
    for _ in range(10):
        trainer.step()
        expected = [0.9 * e + 0.1 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    last = model[0].weight.detach().clone()
    trainer.load_average()
    for e, p in zip(expected, model.parameters(), strict=True):
        assert torch.allclose(e, p, atol=1e-6)
    assert not torch.equal(last, model[0].weight)


def test_gradients_are_clipped_and_bad_ones_dropped() -> None:
    weight = nn.Parameter(torch.zeros(3))
    slope = torch.tensor([300.0, 400.0, 0.0])
    trainer = Trainer(lambda: (weight * slope).sum(), [weight], peak=0.1, clip=1.0)
    trainer.set_rate(1.0)
    trainer.step()
    assert torch.allclose(trainer.flat, torch.tensor([0.6, 0.8, 0.0]), atol=1e-5)
    slope.fill_(float("nan"))
    trainer.step()
    assert bool(weight.isfinite().all())
    assert not bool(trainer.flat.any())


def test_a_timed_run_warms_up_and_decays() -> None:
    _, trainer = toy(False)
    rates: list[float] = []
    original = trainer.set_rate
    trainer.set_rate = lambda share: (rates.append(share), original(share))[1]  # type: ignore[method-assign]
    before = float(trainer.loss_function().detach())
    ticks = itertools.count()
    steps = trainer.run(20, warmup=5, decay=0.5, clock=lambda: float(next(ticks)))
    # The clock is read once at the start and then at every tenth step: 1, 2, ... 20 of 20 seconds.
    assert steps == trainer.steps == len(rates) == 190
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1.0
    assert rates[-1] == pytest.approx(0.1)
    assert float(trainer.loss_function().detach()) < before
    assert (rank(), world_size()) == (0, 1)
