import pytest
import torch

from tritflow.quantization.rounding import round_weight
from tritflow.quantization.smoothing import column_sizes, smoothing_scale
from tritflow.quantization.ternarize import dequantize, mse_optimal
from tritflow.testing import assert_close, random_linear


def weight_and_ranges(seed=0):
    g = torch.Generator().manual_seed(seed)
    weight = random_linear(64, 48, seed=seed).weight.detach()
    return weight, torch.rand(64, generator=g) + 0.5, g


@pytest.mark.parametrize("exponent", [0.0, 0.25, 0.5, 1.0])
def test_outliers_are_undone_whatever_the_exponent_and_the_rows(exponent):
    weight, amax, _ = weight_and_ranges()
    channels = torch.ones(64)
    channels[[3, 40]] = torch.tensor([64.0, 90.0])
    rows = torch.ones(48)
    rows[5] = 77.0  # makes an outlier of the next layer
    plain = smoothing_scale(weight, amax, exponent)
    twin = smoothing_scale(rows[:, None] * weight / channels, amax * channels, exponent)
    ratio = twin * channels / plain
    assert_close(ratio, ratio.mean().expand(64), 1e-4)
    assert plain.log().mean().abs() < 1e-5


def test_the_ends_are_activations_alone_and_weights_alone():
    weight, amax, _ = weight_and_ranges()
    activations = smoothing_scale(weight, amax, 1.0) * amax
    assert_close(activations, activations.mean().expand(64), 1e-5)
    balanced = smoothing_scale(weight, amax, 0.0) / column_sizes(weight)
    assert_close(balanced, balanced.mean().expand(64), 1e-5)


def test_column_sizes_balance_rows_and_columns():
    weight, _, _ = weight_and_ranges()
    scaled = weight * torch.logspace(-2, 2, 48)[:, None] * torch.logspace(1, -1, 64)
    c = column_sizes(scaled)
    rows = (scaled / c).square().mean(dim=1, keepdim=True).sqrt()
    columns = (scaled / c / rows).square().mean(dim=0).sqrt()
    assert_close(columns, columns.mean().expand(64), 1e-4)


def test_channels_without_weights_or_inputs_get_bounded_factors():
    weight, amax, _ = weight_and_ranges()
    weight[:, 7] = 0
    amax[9] = 0
    for exponent in (0.0, 0.5, 1.0):
        c = smoothing_scale(weight, amax, exponent)
        assert torch.isfinite(c).all()
        assert c.max() / c.min() < 1e5
    zero = torch.zeros(4, 8)
    assert_close(smoothing_scale(zero, torch.zeros(8), 0.5), torch.ones(8), 1e-6)


def test_rounding_under_given_columns_is_the_optimum_of_the_rescaled_weight():
    weight, _, g = weight_and_ranges()
    c, h = torch.rand(64, generator=g) + 0.2, torch.rand(64, generator=g)
    q = round_weight(weight, input_importance=h, input_scale=c)
    trits, scale = mse_optimal(weight / c, h * c.square())
    assert torch.equal(q.trits, trits)
    assert torch.equal(q.weight_scale, scale)
    assert torch.equal(q.input_scale, c)
    assert dequantize(q.trits, q.weight_scale, q.input_scale).shape == weight.shape


def test_mistakes_are_named():
    weight, amax, _ = weight_and_ranges()
    with pytest.raises(ValueError, match=r"\[48, 64\] needs ranges"):
        smoothing_scale(weight, amax[:-1], 0.5)
    with pytest.raises(ValueError, match="exponent"):
        smoothing_scale(weight, amax, 1.5)
    with pytest.raises(ValueError, match="overflowed"):
        smoothing_scale(weight, amax * torch.inf, 0.5)
    with pytest.raises(ValueError, match="absmean"):
        round_weight(weight, "absmean", input_scale=amax)


def test_only_outliers_get_a_scale_where_a_ratio_is_given():
    weight, amax, _ = weight_and_ranges()
    assert torch.equal(smoothing_scale(weight, amax, 0.0, outliers=20.0), torch.ones(64))
    channels = torch.ones(64)
    channels[[3, 40]] = torch.tensor([64.0, 90.0])
    c = smoothing_scale(weight / channels, amax * channels, 0.0, outliers=20.0)
    assert (c != 1).nonzero()[:, 0].tolist() == [3, 40]
    # What was multiplied is divided: such a column is then as large as the others.
    sizes = column_sizes(weight / channels) / c
    assert 0.5 < float(sizes[[3, 40]].min() / sizes.median()) < float(sizes[[3, 40]].max() / sizes.median()) < 2
    with pytest.raises(ValueError, match="above 1"):
        smoothing_scale(weight, amax, 0.0, outliers=0.5)
