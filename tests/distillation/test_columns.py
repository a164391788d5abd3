"""Column scales in long training: which columns get them, and how far a step moves what lies behind a large one."""

import math

import pytest
import torch
from torch import nn

from tritflow.config import DistillationConfig, TernaryConfig
from tritflow.distillation.muon import Muon
from tritflow.distillation.parameters import parameter_groups
from tritflow.distillation.state import TrainingState
from tritflow.quantization.convert import prepare_
from tritflow.quantization.rounding import round_weight
from tritflow.quantization.smoothing import smoothing_scale

WIDTH, BATCH = 64, 256


def growth(sizes, weights, scales, rate=6e-3, outliers=0.0, **settings):
    """Train one ternary layer from its rounding: its validation error over that at the beginning, (largest, last).

    Args:
        sizes: of the input channels, [K].
        weights: of the teacher's columns, [K].
        scales: whether columns have scales (from calibration, not trained).
        outliers: as in `smoothing_scale`.
    """
    g = torch.Generator().manual_seed(0)
    teacher = torch.randn(WIDTH, WIDTH, generator=g) * weights / math.sqrt(WIDTH)
    model = nn.ModuleDict({"layer": nn.Linear(WIDTH, WIDTH, bias=False)})
    model["layer"].weight.data.copy_(teacher)
    columns = smoothing_scale(teacher, 4 * sizes, 0.0, outliers) if scales else None
    rounded = round_weight(teacher, "mse", input_scale=columns, input_importance=sizes.square())
    prepare_(model, TernaryConfig(targets=("layer",), column_scale=scales), rounded={"layer": rounded})
    config = DistillationConfig(
        steps=250, batch_size=BATCH, optimizer="muon", column_learning_rate=0.0, learning_rate=rate, **settings
    )
    state = TrainingState(parameter_groups(model, config), config, torch.device("cpu"))
    held = torch.randn(2048, WIDTH, generator=g) * sizes

    @torch.no_grad()
    def error():
        return float((model["layer"](held) - held @ teacher.T).square().mean())

    first, seen = error(), []
    for step in range(config.steps):
        state.set_learning_rates(step)
        x = torch.randn(BATCH, WIDTH, generator=g) * sizes
        state.zero_grad()
        (model["layer"](x) - x @ teacher.T).square().mean().backward()
        state.step()
        if step % 10 == 9:
            seen.append(error() / first)
    return max(seen), seen[-1]


def spread(by):
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    return torch.logspace(-0.5, 0.5, WIDTH, base=by)[order]


def test_large_columns_lose_in_trits_what_they_keep_when_damped():
    """A trit of a column whose weights and inputs are both large moves the output furthest."""
    large = spread(50)
    worst, last = growth(large, large, scales=True)
    damped_worst, damped_last = growth(large, large, scales=True, damp_columns=True)
    assert worst > 1.3
    assert last > 1.08
    assert damped_last <= damped_worst < 1.03


def test_outlier_inputs_throw_training_out_unless_their_columns_have_scales():
    outlying = torch.ones(WIDTH)
    outlying[:3] = 64.0
    worst, _ = growth(outlying, 1 / outlying, scales=False, rate=2e-2)
    scaled, _ = growth(outlying, 1 / outlying, scales=True, rate=2e-2, outliers=20.0)
    damped, _ = growth(outlying, 1 / outlying, scales=True, rate=2e-2, outliers=20.0, damp_columns=True)
    assert worst > 10
    assert scaled < 1.5
    assert damped < 1.5


def test_muon_multiplies_columns_after_orthogonalising():
    g = torch.Generator().manual_seed(0)
    start, grad = torch.randn(6, 8, generator=g), torch.randn(6, 8, generator=g)
    factor = torch.linspace(0.1, 1, 8)
    steps = []
    for factors in (False, True):
        # Two of a shape, one with factors: the other must not notice.
        parameters = [nn.Parameter(start.clone()), nn.Parameter(start.clone())]
        for p in parameters:
            p.grad = grad.clone()
        Muon(parameters, torch.tensor(0.1), factors={id(parameters[0]): factor} if factors else None).step()
        steps.append([(p.detach() - start) for p in parameters])
    plain, with_factors = steps
    torch.testing.assert_close(with_factors[0], plain[0] * factor, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(with_factors[1], plain[1], rtol=1e-6, atol=1e-7)


def test_factors_are_never_above_one_and_only_where_there_are_columns():
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    columns = torch.tensor([4.0, 2.0, 1.0, 1.0, 0.5, 0.25, 1.0, 8.0])
    weight = model["a"].weight.detach()
    rounded = {"a": round_weight(weight, input_scale=columns), "b": round_weight(model["b"].weight.detach())}
    prepare_(model, TernaryConfig(targets=("*",), column_scale=True), rounded=rounded)
    config = DistillationConfig(steps=1, optimizer="muon", damp_columns=True)
    latents = parameter_groups(model, config)[0]
    assert set(latents.factors) == {"a.weight"}
    assert latents.factors["a.weight"].tolist() == pytest.approx([0.25, 0.5, 1, 1, 1, 1, 1, 0.125])
    assert not parameter_groups(model, DistillationConfig(steps=1, optimizer="muon"))[0].factors
