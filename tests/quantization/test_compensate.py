import pytest
import torch

from tritflow.quantization.compensate import InputStatistics, bias_correction, compensate, output_error
from tritflow.quantization.ternarize import mse_optimal, mse_optimal_columns


def layer(rows: int = 48, columns: int = 96, tokens: int = 2048, seed: int = 0):
    """A weight, and inputs whose columns are correlated, uneven and not centred."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g)
    mix = torch.randn(24, columns, generator=g) + 0.3 * torch.randn(1, columns, generator=g)
    x = torch.randn(tokens, 24, generator=g) @ mix + 0.5 * torch.randn(tokens, columns, generator=g) + 0.5
    return weight, x


def statistics(x: torch.Tensor) -> InputStatistics:
    stats = InputStatistics.empty(x.shape[1])
    for part in x.chunk(5):
        stats.add(part.reshape(1, -1, x.shape[1]))
    return stats


def test_statistics_are_the_moments():
    _, x = layer()
    stats = statistics(x)
    torch.testing.assert_close(stats.hessian(), x.T @ x / len(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stats.hessian(centered=True), x.T.cov(correction=0), rtol=1e-3, atol=1e-3)


def test_beats_weight_rounding_on_correlated_inputs():
    weight, x = layer()
    h = statistics(x).hessian()
    plain = output_error(weight, h, *mse_optimal(weight))
    weighted = output_error(weight, h, *mse_optimal(weight, h.diagonal()))
    gptq_only = output_error(weight, h, *compensate(weight, h, sweeps=0))
    full = output_error(weight, h, *compensate(weight, h))
    assert gptq_only < 0.6 * min(plain, weighted)
    assert full < gptq_only
    measured = x @ (weight - _dense(*compensate(weight, h))).T
    assert float(measured.square().sum() / (x @ weight.T).square().sum()) == pytest.approx(float(full), rel=1e-3)


def test_white_inputs_reduce_to_mse_optimal():
    weight, _ = layer()
    trits, scale = compensate(weight, torch.eye(96), damping=0.0)
    expected, expected_scale = mse_optimal(weight)
    assert torch.equal(trits, expected)
    torch.testing.assert_close(scale, expected_scale)


@pytest.mark.parametrize("act_order", [False, True])
def test_block_size_changes_nothing(act_order):
    weight, x = layer(columns=70)
    h = statistics(x).hessian()
    one, one_scale = compensate(weight, h, block_size=70, act_order=act_order)
    many, many_scale = compensate(weight, h, block_size=16, act_order=act_order)
    assert (one != many).float().mean() < 0.002  # only ties in fp32 may fall differently
    torch.testing.assert_close(one_scale, many_scale, rtol=1e-2, atol=1e-4)


def test_bias_takes_up_the_mean():
    weight, x = layer()
    stats = statistics(x)
    trits, scale = compensate(weight, stats.hessian(centered=True))
    bias = bias_correction(weight, trits, scale, stats.mean)
    error = x @ (weight - _dense(trits, scale)).T - bias
    assert error.mean(0).abs().max() < 1e-3
    raw = x @ (weight - _dense(*compensate(weight, stats.hessian()))).T
    assert error.square().mean() < raw.square().mean()


def test_column_scales_are_honoured():
    weight, x = layer()
    weight = weight * torch.logspace(-1, 1, 96)
    h = statistics(x).hessian()
    _, _, column = mse_optimal_columns(weight, h.diagonal())
    trits, scale = compensate(weight, h, input_scale=column)
    with_columns = output_error(weight, h, trits, scale, column)
    assert with_columns < output_error(weight, h, *compensate(weight, h))


def test_rank_deficient_and_dead_inputs():
    weight, x = layer(tokens=10)
    x[:, 5] = 0
    trits, scale = compensate(weight, statistics(x).hessian())
    assert torch.isfinite(scale).all()
    assert trits.abs().max() <= 1
    trits, scale = compensate(weight, torch.zeros(96, 96))
    assert torch.equal(trits, mse_optimal(weight)[0])


def test_errors_are_named():
    weight, _ = layer()
    with pytest.raises(ValueError, match=r"\[96, 96\]"):
        compensate(weight, torch.eye(4))
    with pytest.raises(ValueError, match="NaN"):
        compensate(weight, torch.full((96, 96), float("nan")))
    with pytest.raises(ValueError, match="positive semi-definite"):
        compensate(weight, torch.eye(96) - 2.0 * torch.ones(96, 96) / 3)


def _dense(trits: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return trits.float() * scale[:, None]
