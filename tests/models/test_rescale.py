import pytest
import torch
from torch import nn

from tritflow.models import FLUX1
from tritflow.models.family import ChannelGroup
from tritflow.models.rescale import Rescaling, outlier_factors
from tritflow.testing import relative_error, tiny_flux_transformer, transformer_inputs


def flux(dtype=torch.float64):
    model = tiny_flux_transformer(double=2, single=2).to(dtype)
    groups = FLUX1.channel_groups({"_class_name": "FluxTransformer2DModel", **model.config})
    return model, groups


def rescale_(model, rescaling):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(rescaling.apply(name, parameter))
    return model


def velocity(model, dtype=torch.float64):
    kwargs = transformer_inputs(model, batch=3, dtype=dtype)
    with torch.no_grad():
        return model(**kwargs)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_rescaled_flux_computes_the_same(dtype, tolerance):
    model, groups = flux(dtype)
    before = velocity(model, dtype)
    factors = outlier_factors(groups, channels=3)
    rescale_(model, Rescaling(groups, factors))
    assert relative_error(velocity(model, dtype), before) < tolerance


def test_every_group_alone_computes_the_same():
    before = velocity(flux()[0])
    for name, s in outlier_factors(flux()[1], channels=5).items():
        model, groups = flux()
        rescale_(model, Rescaling(groups, {name: s}))
        assert relative_error(velocity(model), before) < 1e-12, name


def test_factors_become_outliers_in_the_inputs_that_the_groups_read():
    """Every planted channel grows by its factor, in every linear that reads it; nothing else does."""
    model, groups = flux()
    factors = outlier_factors(groups, channels=3)
    amax = {}

    def watch(name):
        return lambda module, args: amax[name].append(args[0].abs().flatten(0, -2).amax(dim=0))

    readers = {linear: group for group in groups for linear, _ in group.columns}
    for name in readers:
        amax[name] = []
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    velocity(model)
    rescale_(model, Rescaling(groups, factors))
    velocity(model)
    assert len(readers) == 2 * (8 + 2) + 2 * 5
    for name, group in readers.items():
        plain, planted = amax[name]
        expected = torch.ones_like(plain)
        expected[: group.channels] = factors[group.name]
        torch.testing.assert_close(planted / plain, expected)
        assert (expected >= 50).sum() == 3


def test_what_it_rounds_to_in_bfloat16_is_small_and_nothing_but_biases_for_a_power_of_two():
    model, groups = flux(torch.bfloat16)
    dense = {n: p.detach().clone() for n, p in model.named_parameters()}
    for low, high, weights in ((50.0, 100.0, 1.001 * 2**-8), (64.0, 64.0, 0.0)):
        rescaling = Rescaling(groups, outlier_factors(groups, low=low, high=high))
        for name, p in dense.items():
            stored, exact = rescaling.apply(name, p).double(), rescaling.apply(name, p.double())
            assert rescaling.apply(name, p).dtype == torch.bfloat16
            error = ((stored - exact).abs() / exact.abs().clamp_min(1e-300)).max()
            assert error <= (1.001 * 2**-8 if name.endswith("bias") else weights)


def test_factors_are_drawn_within_bounds_by_seed():
    groups = [ChannelGroup("a", 64, (("x", 0),), (), (("y", 0),))]
    (s,) = outlier_factors(groups, channels=8).values()
    assert (s != 1).sum() == 8
    assert 50 <= s[s != 1].min() < s.max() <= 100
    assert torch.equal(outlier_factors(groups, channels=8)["a"], s)
    assert not torch.equal(outlier_factors(groups, channels=8, seed=1)["a"], s)


def test_mistakes_are_named():
    groups = [ChannelGroup("a", 4, (("x", 0),), (), (("y", 0),))]
    with pytest.raises(ValueError, match="no group of channels 'b'"):
        Rescaling(groups, {"b": torch.ones(4)})
    with pytest.raises(ValueError, match="4 factors above zero"):
        Rescaling(groups, {"a": torch.zeros(4)})
    with pytest.raises(ValueError, match="5 of them cannot"):
        outlier_factors(groups, channels=5)
    with pytest.raises(ValueError, match="1 <= low <= high"):
        outlier_factors(groups, low=3, high=2)


def test_parts_of_linears_are_rescaled_where_they_lie():
    x, y = nn.Linear(3, 6), nn.Linear(8, 2)
    rescaling = Rescaling([ChannelGroup("a", 4, (("x", 2),), (), (("y", 4),))], {"a": torch.full((4,), 2.0)})
    assert torch.equal(rescaling.apply("x.weight", x.weight)[2:], 2 * x.weight[2:])
    assert torch.equal(rescaling.apply("x.bias", x.bias)[:2], x.bias[:2])
    assert torch.equal(rescaling.apply("y.weight", y.weight)[:, 4:], y.weight[:, 4:] / 2)
    assert rescaling.apply("y.bias", y.bias) is y.bias
