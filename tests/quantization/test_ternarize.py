import itertools

import pytest
import torch

from tritflow.quantization import ternarize
from tritflow.quantization.ternarize import (
    absmean,
    dequantize,
    mse_optimal,
    mse_optimal_columns,
    signal_to_noise,
)


def gaussian(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_gaussian_snr_is_the_theory():
    weight = gaussian(64, 16384)
    assert signal_to_noise(weight, *mse_optimal(weight)) == pytest.approx(7.2, abs=0.05)
    assert signal_to_noise(weight, *absmean(weight)) == pytest.approx(5.8, abs=0.1)
    trits, scale = mse_optimal(weight)
    assert (trits == 0).float().mean().item() == pytest.approx(0.46, abs=0.01)
    assert scale.mean().item() == pytest.approx(1.22, abs=0.01)


def test_absmean_is_the_papers_formula():
    weight = gaussian(7, 33).to(torch.bfloat16)
    trits, scale = absmean(weight)
    expected = weight.float().abs().mean(1)
    assert torch.equal(scale, expected)
    assert torch.equal(trits.float(), (weight.float() / expected[:, None]).round().clamp(-1, 1))


@pytest.mark.parametrize("weighted", [False, True])
def test_mse_optimal_beats_every_other_ternary_row(weighted):
    weight = gaussian(5, 6, seed=3)
    importance = gaussian(1, 6, seed=4)[0].abs() + 0.05 if weighted else None
    h = torch.ones(6) if importance is None else importance
    trits, scale = mse_optimal(weight, importance)
    error = (h * (weight - dequantize(trits, scale)).square()).sum(1)
    every = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=6)))[:, None]  # [729, 1, 6]
    fit = (h * every * weight).sum(2) / (h * every.square()).sum(2).clamp_min(1e-9)
    best = (h * (weight - fit[..., None] * every).square()).sum(2).amin(0)
    torch.testing.assert_close(error, best, rtol=1e-4, atol=1e-6)


def test_column_scales_help_uneven_columns_and_never_hurt():
    columns = torch.logspace(-1, 1, 256)
    weight = gaussian(96, 256) * columns
    plain = signal_to_noise(weight, *mse_optimal(weight))
    trits, scale, column = mse_optimal_columns(weight)
    assert signal_to_noise(weight, trits, scale, column) > 7.15
    assert plain < 6
    assert (trits == 0).float().mean(0).max() < 0.8  # small columns are not simply dropped
    assert column.log().mean().abs() < 1e-3
    even = gaussian(96, 256, seed=9)
    assert signal_to_noise(even, *mse_optimal_columns(even)) >= signal_to_noise(even, *mse_optimal(even))


def test_chunks_change_nothing(monkeypatch):
    weight = gaussian(37, 50)
    whole = [*absmean(weight), *mse_optimal(weight), *mse_optimal_columns(weight, rounds=2)]
    monkeypatch.setattr(ternarize, "CHUNK_ELEMENTS", 101)
    parts = [*absmean(weight), *mse_optimal(weight), *mse_optimal_columns(weight, rounds=2)]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", [absmean, mse_optimal])
def test_edge_rows(function):
    weight = torch.stack([torch.zeros(8), torch.full((8,), -0.5), torch.tensor([3.0] + [0.0] * 7)])
    trits, scale = function(weight)
    assert trits[0].tolist() == [0] * 8
    assert scale[0] == 0
    assert torch.equal(dequantize(trits, scale)[1], weight[1])
    assert trits[2].tolist() == [1] + [0] * 7
    with pytest.raises(ValueError, match="NaN"):
        function(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="matrix"):
        function(torch.zeros(3))


def test_importance_is_checked():
    weight = gaussian(2, 4)
    with pytest.raises(ValueError, match=r"shape \[4\]"):
        mse_optimal(weight, torch.ones(3))
    with pytest.raises(ValueError, match="not negative"):
        mse_optimal(weight, -torch.ones(4))
