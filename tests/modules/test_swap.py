from __future__ import annotations

import pytest
import torch
from torch import nn

from tritflow.modules import FakeTernaryLinear, TernaryLinear, swap_linears_


def _model():
    shared = nn.Linear(8, 8)
    return nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
            "b": nn.ModuleDict({"x": shared, "y": shared}),
            "norm": nn.LayerNorm(8),
        }
    )


def _fake(_, linear):
    return FakeTernaryLinear.from_linear(linear, linear.weight.abs().mean(1))


def test_only_chosen_linears_are_swapped_and_named():
    model = _model().eval()
    seen = []
    names = swap_linears_(model, lambda n, m: seen.append(n) or n != "a.2", _fake)
    assert names == ["a.0", "b.x"]
    assert seen[:2] == ["a.0", "a.2"]
    assert isinstance(model["a"][0], FakeTernaryLinear)
    assert type(model["a"][2]) is nn.Linear
    assert model["b"]["x"] is model["b"]["y"]
    assert not model["a"][0].training


def test_ternary_layers_are_left_alone():
    model = _model()
    swap_linears_(model, lambda n, m: True, lambda n, m: _fake(n, m).to_ternary())
    assert sum(isinstance(m, TernaryLinear) for m in model.modules()) == 3
    assert swap_linears_(model, lambda n, m: True, _fake) == []
    assert torch.isfinite(model["a"](torch.randn(2, 8))).all()


def test_a_bare_linear_cannot_be_swapped():
    with pytest.raises(ValueError, match="itself one linear layer"):
        swap_linears_(nn.Linear(4, 4), lambda n, m: True, _fake)
