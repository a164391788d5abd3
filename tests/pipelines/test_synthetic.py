from __future__ import annotations

import pytest
import torch

from tritflow.formats.packing import check_2bit
from tritflow.models.flux1 import is_modulation
from tritflow.modules import TernaryLinear
from tritflow.pipelines.synthetic import random_dense, random_ternary
from tritflow.testing import transformer_inputs

CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 24,
    "num_attention_heads": 2,
    "axes_dims_rope": [4, 8, 12],
    "num_layers": 2,
    "num_single_layers": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 16,
    "in_channels": 16,
    "guidance_embeds": True,
}


@pytest.mark.parametrize("make", [random_dense, random_ternary])
def test_activations_keep_an_ordinary_size(make):
    torch.manual_seed(0)
    model = make(CONFIG, "cpu")
    with torch.no_grad():
        out = model(**transformer_inputs(model, dtype=torch.bfloat16))[0]
    assert not model.training
    assert model.dtype == torch.bfloat16
    assert 0.05 < out.float().std() < 50


def test_ternary_layers_hold_valid_trits():
    model = random_ternary(CONFIG, "cpu", mode="w2a16", modulation_device="cpu")
    linears = {name: m for name, m in model.named_modules() if isinstance(m, TernaryLinear)}
    assert len(linears) == 2 * 14 + 2 * 6
    assert sum(is_modulation(name) for name in linears) == 2 * 2 + 2
    for linear in linears.values():
        check_2bit(linear.packed, linear.in_features)  # raises for the code 10 and for nonzero padding
        assert linear.mode == "w2a16"
    counts = torch.stack(
        [(linears["single_transformer_blocks.0.proj_mlp"].trits() == t).float().mean() for t in (-1, 0, 1)]
    )
    assert (counts - 1 / 3).abs().max() < 0.05
