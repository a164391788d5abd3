"""peft takes a ternary layer for the linear it stands for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tritflow.testing import assert_close

peft = pytest.importorskip("peft")


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_lora_adds_to_a_ternary_layer_and_trains(make_ternary, mode):
    layer = make_ternary(mode=mode)
    model = nn.Sequential()
    model.add_module("proj", layer)
    x = torch.randn(6, 200)
    base = model(x)
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, lora_alpha=8, target_modules=["proj"]), model)
    assert torch.equal(model(x), base)  # B starts at zero

    a, b = model.proj.lora_A["default"].weight, model.proj.lora_B["default"].weight
    assert (a.shape, b.shape) == ((4, 200), (64, 4))
    nn.init.normal_(b)
    low_rank = 2.0 * F.linear(F.linear(x, a), b)
    assert_close(model(x) - base, low_rank, 1e-4)
    if mode == "w2a16":
        assert_close(model(x), F.linear(x, layer.dequantize() + 2.0 * b @ a, layer.bias), 1e-5)

    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "proj.lora_A.default.weight",
        "proj.lora_B.default.weight",
    ]
    model(x).square().mean().backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    assert torch.equal(layer.trits(), model.proj.base_layer.trits())
