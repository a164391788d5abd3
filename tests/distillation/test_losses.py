"""Weighed velocity losses: what they weigh, and their gradients."""

import pytest
import torch

from tritflow.config import DistillationConfig
from tritflow.distillation.losses import early, frequency_weights, measure_of, plain, spectrum

GRID, CHANNELS = (4, 6), 3


def packed(picture):
    """[B, C, H, W] to [B, T, 4 C], as FluxPipeline packs latents."""
    b, c, h, w = picture.shape
    x = picture.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(b, h // 2 * (w // 2), 4 * c)


def velocities(seed=0):
    g = torch.Generator().manual_seed(seed)
    shape = (2, CHANNELS, 2 * GRID[0], 2 * GRID[1])
    return packed(torch.randn(shape, generator=g)), packed(torch.randn(shape, generator=g))


def test_without_weights_it_is_the_mean_square():
    a, b = velocities()
    assert measure_of(DistillationConfig(), GRID) is plain
    torch.testing.assert_close(spectrum(a - b, GRID, 0.0).mean(), (a - b).square().mean())


def test_high_frequencies_weigh_as_much_more_as_asked():
    weights = frequency_weights(8, 12, 3.0)
    assert float(weights.mean()) == pytest.approx(1)
    assert float(weights.max() / weights[0, 0]) == pytest.approx(4)
    flat = torch.ones(1, 1, 8, 12)
    checkered = flat.clone()
    checkered[:, :, ::2] *= -1
    checkered[..., ::2] *= -1
    low, high = (float(spectrum(packed(x), GRID, 3.0)) for x in (flat, checkered))
    assert high / low == pytest.approx(4, rel=1e-4)
    assert float(spectrum(packed(flat), GRID, 0.0)) == pytest.approx(1)


def test_early_steps_weigh_as_much_more_as_asked():
    t = torch.linspace(0, 1, 1001)
    weights = early(t, 2.0)
    assert float(weights.mean()) == pytest.approx(1, abs=1e-3)
    assert float(weights[-1] / weights[0]) == pytest.approx(3)
    # Steps of the first quarter, and hardly any other.
    assert float(weights[500] / weights[0]) == pytest.approx(1, abs=0.01)
    assert bool((early(t, -0.5).diff() <= 0).all())


def test_gradients_are_those_of_the_weighed_square():
    """Along a wave of one frequency and one sample the gradient is the plain one times the two weights."""
    measure = measure_of(DistillationConfig(detail_weight=3.0, early_weight=2.0), GRID)
    time = torch.tensor([0.0, 1.0])
    rows = torch.arange(8)[:, None].expand(8, 12)
    for wave, place in ((torch.ones(8, 12), (0, 0)), ((-1.0) ** rows, (4, 0))):
        error = packed(wave.expand(2, 1, 8, 12).contiguous())
        predicted = error.clone().requires_grad_()
        measure(predicted, torch.zeros_like(error), {"timestep": time}).backward()
        expected = 2 * error / error.numel() * frequency_weights(8, 12, 3.0)[place] * early(time, 2.0)[:, None, None]
        torch.testing.assert_close(predicted.grad, expected, rtol=1e-4, atol=1e-8)


def test_gradients_agree_with_differences():
    a, b = velocities(1)
    measure = measure_of(DistillationConfig(detail_weight=5.0, early_weight=1.0), GRID)
    time = {"timestep": torch.tensor([0.2, 0.9])}
    predicted = a.clone().requires_grad_()
    measure(predicted, b, time).backward()
    direction = torch.randn(a.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        slope = (measure(a + 0.05 * direction, b, time) - measure(a - 0.05 * direction, b, time)) / 0.1
    assert float((predicted.grad * direction).sum()) == pytest.approx(float(slope), rel=1e-3)
