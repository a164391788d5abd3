"""The fused forward against diffusers' own on tiny ternary models; `tests/gpu` has it on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tritflow.models.flux1_fused import FusedFlux1, why_not
from tritflow.models.modulation import apply_elsewhere
from tritflow.modules import TernaryLinear, swap_linears_
from tritflow.testing import assert_close, relative_error, tiny_flux_transformer, transformer_inputs

STRENGTH = 2  # row scales beyond absmean's, so that blocks of random weights matter beside the residual
BF16 = 1e-2  # of a whole model: the stock forward rounds some thirty times a block, the fused one ten
W2A8 = {torch.float32: 2e-3, torch.bfloat16: 1.5e-2}
"""Stated tolerance: one integer step of an activation, where the two forwards fall on different sides of a half.
Quantizing activations at all moves these models by 5e-3."""


def ternary_transformer(*, mode="w2a16", columns=False, skip=(), dtype=torch.float32, seed=0, **kwargs):
    """A tiny FLUX whose block linears are ternary, with input scales that differ from layer to layer if asked for."""
    settings = {"activation_dtype": kwargs.pop("activation_dtype", "int8")}
    model = tiny_flux_transformer(**({"hidden": 48, "heads": 3, "double": 2, "single": 2, "seed": seed} | kwargs))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # norms with weights that matter
        for name, parameter in model.named_parameters():
            if "norm_" in name and name.endswith("weight") and parameter.dim() == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)

    def make(name: str, linear: nn.Linear) -> TernaryLinear:
        weight = linear.weight.detach()
        scale = weight.abs().mean(1) * STRENGTH
        trits = (weight / scale[:, None] * STRENGTH).round().clamp(-1, 1).to(torch.int8)
        c = torch.rand(linear.in_features, generator=generator) + 0.5 if columns else None
        return TernaryLinear.from_linear(linear, trits, scale, c, mode=mode, **settings)

    swap_linears_(
        model, lambda name, _: "transformer_blocks" in name and not name.endswith(tuple(skip) or ("~",)), make
    )
    return model.to(dtype).eval()


def _error(model, batch=2, dtype=torch.float32, **kwargs):
    inputs = transformer_inputs(model, batch=batch, dtype=dtype)
    with torch.no_grad():
        expected = model(**inputs)[0]
        found = FusedFlux1(model, **kwargs).forward(**inputs)[0]
    assert found.dtype == expected.dtype
    return relative_error(found, expected)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("columns", [False, True])
def test_w2a16_equals_the_stock_forward(columns, guidance):
    assert _error(ternary_transformer(columns=columns, guidance=guidance)) < 1e-5


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_w2a8_is_within_the_stated_tolerance(kind, columns):
    model = ternary_transformer(mode="w2a8", columns=columns, activation_dtype=kind)
    assert _error(model) < W2A8[torch.float32]


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_bf16_is_within_rounding(mode):
    """Both forwards against float32: the fused one may not be the farther one by more than a fiftieth."""
    model = ternary_transformer(mode=mode)
    inputs = transformer_inputs(model, batch=2)
    with torch.no_grad():
        truth = model(**inputs)[0]
        half = copy.deepcopy(model).bfloat16()
        inputs = transformer_inputs(model, batch=2, dtype=torch.bfloat16)
        stock = half(**inputs)[0]
        fused = FusedFlux1(half).forward(**inputs)[0]
    assert relative_error(fused, stock) < (BF16 if mode == "w2a16" else W2A8[torch.bfloat16])
    assert relative_error(fused, truth) < 1.02 * relative_error(stock, truth)


def test_dense_layers_among_the_ternary_ones():
    assert _error(ternary_transformer(skip=("to_k", "proj_mlp", "norm1.linear", "net.2"))) < 1e-5
    assert _error(ternary_transformer(mode="w2a8", skip=("to_q", "proj_out"))) < W2A8[torch.float32]


def test_layers_of_several_settings():
    model = ternary_transformer(mode="w2a8")
    for name, module in model.named_modules():
        if name.endswith(("to_v", "add_k_proj", "proj_mlp")):
            module.mode = "w2a16"
    assert _error(model) < W2A8[torch.float32]


def test_a_head_of_64_and_one_image():
    assert _error(ternary_transformer(hidden=128, heads=2), batch=1) < 1e-5


def test_joined_layers_share_memory_and_are_given_back():
    model = ternary_transformer(mode="w2a8")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fused = FusedFlux1(model)
    attn = model.transformer_blocks[0].attn
    joint = fused.doubles[0].image.qkv.parts
    assert len(joint) == 1
    assert attn.to_q.packed.data_ptr() == joint[0].weight.data_ptr()
    storage = attn.to_k.packed.untyped_storage().data_ptr()
    assert storage == attn.to_v.packed.untyped_storage().data_ptr()
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k
    fused.release()
    assert attn.to_k.packed.untyped_storage().nbytes() == attn.to_k.packed.nbytes
    for k, v in model.state_dict().items():
        assert torch.equal(v, before[k]), k


def test_loading_other_weights_is_seen():
    model, other = ternary_transformer(), ternary_transformer(seed=1)
    inputs = transformer_inputs(model)
    fused = FusedFlux1(model)
    with torch.no_grad():
        expected = other(**inputs)[0]
        model.load_state_dict(other.state_dict())
        assert_close(fused.forward(**inputs)[0], expected, 1e-5)
        model.load_state_dict(ternary_transformer().state_dict(), assign=True)
        assert_close(fused.forward(**inputs)[0], ternary_transformer()(**inputs)[0], 1e-5)


def test_changed_settings_are_seen():
    model = ternary_transformer()
    inputs = transformer_inputs(model)
    fused = FusedFlux1(model)
    with torch.no_grad():
        full = fused.forward(**inputs)[0]
        for module in model.modules():
            if isinstance(module, TernaryLinear):
                module.mode = "w2a8"
        expected = model(**inputs)[0]
        assert_close(fused.forward(**inputs)[0], expected, W2A8[torch.float32])
    assert relative_error(full, expected) > 2 * W2A8[torch.float32]


class _Scheduler:
    def __init__(self, *timesteps):
        self.timesteps = torch.tensor(timesteps)


def test_modulation_of_all_steps_is_computed_once(monkeypatch):
    model = ternary_transformer(mode="w2a8")
    scheduler = _Scheduler(900.0, 500.0, 100.0)
    fused = FusedFlux1(model, scheduler)
    calls = []
    compute = fused.modulation.compute
    monkeypatch.setattr(fused.modulation, "compute", lambda *a: calls.append(len(a[0])) or compute(*a))
    inputs = transformer_inputs(model, batch=2)
    with torch.no_grad():
        for step, t in enumerate(scheduler.timesteps):
            inputs["timestep"] = t.expand(2) / 1000
            found, expected = fused.forward(**inputs)[0], model(**inputs)[0]
            assert_close(found, expected, W2A8[torch.float32])
            assert calls == [6], step
        inputs["timestep"] = torch.tensor([0.3, 0.3])  # not in the schedule
        assert_close(fused.forward(**inputs)[0], model(**inputs)[0], W2A8[torch.float32])
        inputs["timestep"] = torch.tensor([0.9, 0.5])  # not one time for all
        assert_close(fused.forward(**inputs)[0], model(**inputs)[0], W2A8[torch.float32])
        assert calls == [6, 2, 2]
        inputs["timestep"] = torch.tensor([0.9, 0.9])
        for _ in range(2):  # another prompt, and back: true guidance alternates
            for pooled in (inputs["pooled_projections"], -inputs["pooled_projections"]):
                other = inputs | {"pooled_projections": pooled}
                assert_close(fused.forward(**other)[0], model(**other)[0], W2A8[torch.float32])
        inputs["pooled_projections"].mul_(2)  # a write in place is another prompt too
        assert_close(fused.forward(**inputs)[0], model(**inputs)[0], W2A8[torch.float32])


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
@pytest.mark.parametrize("columns", [False, True])
def test_a_layer_whose_tensors_are_elsewhere(mode, columns, monkeypatch):
    model = ternary_transformer(mode=mode, columns=columns)
    x = torch.randn(2, 48)
    for linear in (model.transformer_blocks[0].norm1.linear, model.norm_out.linear):
        expected = linear(x)
        twin = copy.deepcopy(linear)
        # There is one device here; a layer that says it is elsewhere is copied all the same.
        monkeypatch.setattr(type(twin.weight), "device", property(lambda self: torch.device("meta")), raising=False)
        found = apply_elsewhere(twin, x)
        monkeypatch.undo()
        assert_close(found, expected, 1e-6)


def test_what_it_does_not_know_takes_the_stock_forward(caplog):
    model = ternary_transformer()
    fused = FusedFlux1(model)
    inputs = transformer_inputs(model)
    residuals = [torch.randn(1, 16, 48)]
    with torch.no_grad():
        for extra in ({"controlnet_block_samples": residuals}, {"controlnet_single_block_samples": residuals}):
            given = inputs | extra
            assert torch.equal(fused.forward(**given)[0], model(**given)[0])
    assert caplog.text.count("ControlNet residuals are given") == 1
    inputs["hidden_states"].requires_grad_()
    assert fused.forward(**inputs)[0].requires_grad
    assert "gradients are asked for" in caplog.text


def test_why_not():
    assert why_not(ternary_transformer()) is None
    assert "not a FluxTransformer2DModel" in why_not(nn.Linear(2, 2))
    assert "no ternary layer" in why_not(tiny_flux_transformer())
    assert "training mode" in why_not(ternary_transformer().train())
    model = ternary_transformer()
    model.transformer_blocks[0].register_forward_hook(lambda *a: None)
    assert "hooks" in why_not(model)
    with pytest.raises(ValueError, match=r"cannot be used: transformer_blocks\.0 carries hooks"):
        FusedFlux1(model)


def test_blocks_compile_without_a_graph_break():
    model = ternary_transformer(mode="w2a8")
    fused = FusedFlux1(model)
    inputs = transformer_inputs(model)
    with torch.no_grad():
        eager = fused.forward(**inputs)[0]
        fused._core = torch.compile(fused._core, fullgraph=True, backend="aot_eager")
        assert_close(fused.forward(**inputs)[0], eager, 1e-5)


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_attention_by_name(name):
    model = ternary_transformer(hidden=64, heads=2)
    assert 1e-5 < _error(model, attention=name) < 0.1
    assert _error(model, attention="16bit") < 1e-5


def test_an_unknown_attention_is_named():
    with pytest.raises(ValueError, match="unknown attention 'int7'; did you mean 'int8'"):
        FusedFlux1(ternary_transformer(), attention="int7")
