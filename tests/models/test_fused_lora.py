"""LoRA in the fused forward: diffusers' own forward with the same adapters is the truth; unloaded, the former bits."""

from __future__ import annotations

import pytest
import torch
from test_flux1_fused import BF16, W2A8, ternary_transformer
from torch import nn

from tritflow.models.flux1_fused import FusedFlux1, why_not
from tritflow.models.low_rank import LowRank
from tritflow.modules import TernaryLinear
from tritflow.pipelines.lora_layer import adopt_
from tritflow.testing import assert_close, relative_error, transformer_inputs

peft = pytest.importorskip("peft")

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
FEED_FORWARD = ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp", "proj_out"]
MODULATION = ["norm1.linear", "norm1_context.linear", "norm.linear", "norm_out.linear"]
FROM_ROWS = 1e-2
"""Stated tolerance of W2A8 with adapters this strong: the stock forward gives them the full rows, the fused one the
rows that were quantized for the product, half a percent away."""


def add_lora(model, name="style", targets=(*ATTENTION, *FEED_FORWARD), rank=4, seed=0, strength=0.3, **settings):
    """An adapter with both factors random, as strong as `strength` times the layers themselves."""
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), **settings)
    model.add_adapter(config, adapter_name=name)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".{name}." in key and "lora_" in key:
                rows = rank if "lora_B" in key else parameter.shape[1]
                factor = strength if "lora_B" in key else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=g) * rows**-0.5 * factor)
    model.eval()
    return model


def _both(fused, model, inputs):
    with torch.no_grad():
        return fused.forward(**inputs)[0], model(**inputs)[0]


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize(("mode", "tolerance"), [("w2a16", 1e-5), ("w2a8", FROM_ROWS)])
def test_equals_the_stock_forward(mode, tolerance, columns, caplog):
    model = ternary_transformer(mode=mode, columns=columns)
    inputs = transformer_inputs(model, batch=2)
    fused = FusedFlux1(model)
    plain, _ = _both(fused, model, inputs)
    add_lora(model)
    found, expected = _both(fused, model, inputs)
    assert_close(found, expected, tolerance)
    assert relative_error(plain, expected) > 5 * FROM_ROWS
    assert "stock forward" not in caplog.text
    model.unload_lora()
    again, _ = _both(fused, model, inputs)
    assert torch.equal(again, plain)


@pytest.mark.parametrize(("mode", "tolerance"), [("w2a16", BF16), ("w2a8", W2A8[torch.bfloat16])])
def test_bf16_with_adopted_layers(mode, tolerance):
    model = add_lora(ternary_transformer(mode=mode)).bfloat16()
    assert adopt_(model) > 0
    found, expected = _both(FusedFlux1(model), model, transformer_inputs(model, dtype=torch.bfloat16))
    assert_close(found, expected, tolerance)


@pytest.mark.parametrize("targets", [["to_q"], ["to_v", "proj_out"], ["add_k_proj", "ff.net.2"], MODULATION])
def test_some_layers_only(targets):
    model = ternary_transformer()
    inputs = transformer_inputs(model)
    fused = FusedFlux1(model)
    plain, _ = _both(fused, model, inputs)
    found, expected = _both(fused, add_lora(model, targets=targets), inputs)
    assert_close(found, expected, 1e-5)
    assert relative_error(plain, found) > 1e-3


def test_layers_outside_the_blocks_and_dense_ones():
    model = ternary_transformer(skip=("to_k", "proj_mlp", "norm1.linear"))
    inputs = transformer_inputs(model)
    fused = FusedFlux1(model)
    targets = ["x_embedder", "context_embedder", "timestep_embedder.linear_1", "to_k", "to_q", "proj_mlp", *MODULATION]
    for step in range(2):  # the second time conditioning, which is kept from step to step, has to be seen to change
        found, expected = _both(fused, add_lora(model, f"a{step}", targets, seed=step), inputs)
        assert_close(found, expected, 1e-5)


def test_several_at_once_weighed_switched_and_written_to():
    model = ternary_transformer()
    inputs = transformer_inputs(model, batch=2)
    fused = FusedFlux1(model)
    plain, _ = _both(fused, model, inputs)
    add_lora(model, "a", rank=3)
    add_lora(model, "b", ["to_q", "to_v", "proj_mlp"], rank=20, seed=1)
    seen = []

    def check():
        found, expected = _both(fused, model, inputs)
        assert_close(found, expected, 1e-5)
        assert all(relative_error(found, other) > 1e-4 for other in seen)
        seen.append(found)

    check()
    model.set_adapters(["a", "b"], weights=[0.7, -0.4])
    check()
    model.set_adapters(["a", "b"], weights=[0.7, 1.3])
    check()
    model.set_adapter("b")
    check()
    with torch.no_grad():
        model.transformer_blocks[0].attn.to_q.lora_B["b"].weight.mul_(-1)
    check()
    model.disable_lora()
    assert torch.equal(_both(fused, model, inputs)[0], plain)
    model.enable_lora()
    assert torch.equal(_both(fused, model, inputs)[0], seen[-1])
    model.delete_adapters("b")
    model.set_adapters(["a"], weights=[0.0])
    assert torch.equal(_both(fused, model, inputs)[0], plain)
    model.unload_lora()
    assert torch.equal(_both(fused, model, inputs)[0], plain)


def test_one_pass_over_the_rows_of_a_single_block(monkeypatch):
    """Query, key, value and the MLP read the same rows; the output projection reads others."""
    from tritflow.models import fused as room

    model = add_lora(ternary_transformer(mode="w2a8"))
    fused = FusedFlux1(model)
    passes = []
    down = room.low_rank_down
    monkeypatch.setattr(room, "low_rank_down", lambda q, *rest: passes.append(rest[1].shape[0]) or down(q, *rest))
    found, expected = _both(fused, model, transformer_inputs(model))
    assert passes == [48, 48, *[16] * 6] * 2 + [64, 16] * 2
    assert_close(found, expected, FROM_ROWS)


def test_loaded_before_the_plan_and_released():
    model = add_lora(ternary_transformer(mode="w2a8"))
    inputs = transformer_inputs(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = FusedFlux1(model)
    found, expected = _both(fused, model, inputs)
    assert_close(found, expected, FROM_ROWS)
    fused.release()
    to_k = model.transformer_blocks[0].attn.to_k.base_layer
    assert to_k.packed.untyped_storage().nbytes() == to_k.packed.nbytes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_layers_of_different_sizes_are_block_diagonal():
    layers = []
    for i, rows in enumerate((24, 40, 8)):
        linear = nn.Linear(48, rows, bias=False)
        holder = nn.Sequential()
        holder.add_module(
            "proj", TernaryLinear.from_linear(linear, torch.zeros(rows, 48, dtype=torch.int8), torch.ones(rows))
        )
        peft.inject_adapter_in_model(peft.LoraConfig(r=3 + i, target_modules=["proj"], init_lora_weights=False), holder)
        layers.append(holder.proj)
    x = torch.randn(5, 48)
    expected = torch.cat(
        [layer.lora_B["default"](layer.lora_A["default"](x)) * layer.scaling["default"] for layer in layers], 1
    )
    down, up = LowRank.of(layers).made(torch.float32)
    assert (down.shape, up.shape) == ((16, 48), (72, 16))
    assert_close(x @ down.t() @ up.t(), expected, 1e-5)
    assert LowRank.of([layers[0].base_layer]) is None


def _fallback(model, text, caplog):
    """It says why, and computes what the stock forward computes."""
    assert text in why_not(model)
    inputs = transformer_inputs(model)
    fresh = ternary_transformer()
    fused = FusedFlux1(fresh)
    fused.transformer, fused.stock_forward, fused._signature = model, model.forward, []
    with torch.no_grad():
        assert torch.equal(fused.forward(**inputs)[0], model(**inputs)[0])
    assert caplog.text.count(text) == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"use_dora": True}, "LoRA 'style' is a variant (DoraLinearVariant)"), ({"lora_bias": True}, "has a bias")],
)
def test_variants_take_the_stock_forward(settings, text, caplog):
    skip = ("to_q",)  # peft computes a magnitude from the dense weight
    model = ternary_transformer(skip=skip)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], **settings), adapter_name="style")
    _fallback(model.eval(), text, caplog)


def test_other_kinds_take_the_stock_forward(caplog):
    model = ternary_transformer(skip=("to_k",))
    peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["to_k"]), model)
    _fallback(model.eval(), "an adapter that is no plain LoRA is loaded", caplog)


def test_a_merged_adapter_takes_the_stock_forward(caplog):
    model = add_lora(ternary_transformer(skip=("to_k",)), targets=["to_k"])
    for module in model.modules():
        if hasattr(module, "merge") and hasattr(module, "lora_A"):
            module.merge()
    _fallback(model, "a LoRA was merged into the weight", caplog)


def test_a_layer_derived_from_pefts_takes_the_stock_forward():
    from peft.tuners import lora

    model = add_lora(ternary_transformer(), targets=["to_k"])
    derived = type("Derived", (lora.Linear,), {"__module__": "elsewhere"})
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = derived
    assert "no plain LoRA is loaded (Derived)" in why_not(model)
