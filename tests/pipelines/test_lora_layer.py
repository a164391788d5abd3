"""The layer that peft's becomes: peft's numbers, less traffic, and peft's own way for all that is not inference."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

from tritflow import TernaryLinear, TritflowConfig
from tritflow.pipelines.lora import LoraError
from tritflow.testing import assert_close, random_linear, transformer_inputs

pytest.importorskip("peft")

import peft

from tritflow.pipelines.lora_layer import TernaryLora, adopt_

pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")


def make(mode: str = "w2a16", adapters: int = 2, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """(adopted, peft's own) over the same ternary layer, with non-zero adapters."""
    g = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (64, 200), generator=g, dtype=torch.int8)
    model = nn.Sequential()
    model.add_module(
        "proj", TernaryLinear.from_linear(random_linear(200, 64), trits, torch.rand(64, generator=g), mode=mode)
    )
    for i in range(adapters):
        config = peft.LoraConfig(r=4 + i, lora_alpha=8, target_modules=["proj"], **settings)
        peft.inject_adapter_in_model(config, model, adapter_name=str(i))
        nn.init.normal_(model.proj.lora_B[str(i)].weight, generator=g)
    model.proj.set_adapter([str(i) for i in range(adapters)])
    stock = copy.deepcopy(model)
    assert adopt_(model) == 1
    assert adopt_(model) == 0
    assert type(model.proj) is TernaryLora
    assert type(stock.proj) is not TernaryLora
    return model, stock


@pytest.fixture
def peft_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever peft's own forward runs."""
    calls: list[int] = []
    forward = peft.tuners.lora.Linear.forward

    def counted(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(1)
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(peft.tuners.lora.Linear, "forward", counted)
    return calls


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
@pytest.mark.parametrize("shape", [(200,), (3, 200), (2, 5, 200)])
def test_equals_peft(mode: str, shape: tuple[int, ...], peft_calls: list[int]) -> None:
    model, stock = make(mode)
    x = torch.randn(shape)
    kept = x.clone()
    with torch.no_grad():
        for weights in ((1.0, 1.0), (0.5, -2.0)):
            for layer in (model.proj, stock.proj):
                for name, weight in zip("01", weights, strict=True):
                    layer.set_scale(name, weight)
            peft_calls.clear()
            found = model(x)
            assert not peft_calls
            assert_close(found, stock(x), 1e-6)
        model.proj.set_adapter(["1"])
        stock.proj.set_adapter(["1"])
        assert_close(model(x), stock(x), 1e-6)
    assert torch.equal(x, kept)


def test_bf16_is_rounded_once() -> None:
    model, stock = (m.to(torch.bfloat16) for m in make())
    exact = make()[0]
    for parameter, rounded in zip(exact.parameters(), model.parameters(), strict=True):
        if parameter.is_floating_point():
            parameter.data = rounded.data.float()
    x = torch.randn(400, 200).bfloat16()
    with torch.no_grad():
        truth = exact(x.float())
        ours, theirs = ((m(x).float() - truth).norm() / truth.norm() for m in (model, stock))
    assert ours < theirs < 0.02


def test_disabled_and_unloaded_it_is_the_bare_layer() -> None:
    model, _ = make()
    x = torch.randn(3, 200)
    with torch.no_grad():
        bare = model.proj.base_layer(x)
        assert not torch.equal(model(x), bare)
        model.proj.enable_adapters(False)
        assert torch.equal(model(x), bare)
        model.proj.enable_adapters(True)
        model.proj.set_adapter([])
        assert torch.equal(model(x), bare)


def test_what_is_no_plain_inference_goes_pefts_way(peft_calls: list[int]) -> None:
    model, stock = make()
    x = torch.randn(3, 200)
    model(x).square().sum().backward()
    assert model.proj.lora_A["0"].weight.grad.abs().sum() > 0
    assert len(peft_calls) == 1
    with torch.no_grad():
        assert model(x.double()).dtype == stock(x.double()).dtype
        assert len(peft_calls) == 3
        assert model(torch.empty(0, 200)).shape == (0, 64)
        dropping, _ = make(adapters=1, lora_dropout=0.5)
        peft_calls.clear()
        dropping(x)
        assert peft_calls


def test_merging_is_refused_until_the_base_is_dense() -> None:
    model, stock = make(adapters=1)
    x = torch.randn(3, 200)
    before = model.proj.base_layer.packed.clone()
    for safe in (False, True):
        with pytest.raises(LoraError, match="cannot be fused"):
            model.proj.merge(safe_merge=safe)
    assert torch.equal(model.proj.base_layer.packed, before)
    dense = nn.Linear(200, 64)
    dense.weight.data, dense.bias.data = stock.proj.base_layer.dequantize(), stock.proj.base_layer.bias.data
    model.proj.base_layer = dense
    model.proj.merge()
    with torch.no_grad():
        assert_close(model(x), stock(x), 1e-5)


def test_it_compiles_whole() -> None:
    model, _ = make()
    x = torch.randn(4, 200)
    with torch.no_grad():
        assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x), 1e-6)


def test_models_adopt_when_they_load_and_copies_load_into_themselves(tiny_flux: Path) -> None:
    model: Any = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer", quantization_config=TritflowConfig())
    twin = copy.deepcopy(model)
    at = "transformer_blocks.0.attn.to_q"
    lora = {f"{at}.lora_A.weight": torch.randn(4, 32), f"{at}.lora_B.weight": torch.randn(32, 4)}
    twin.load_lora_adapter(lora, prefix=None)
    assert type(twin.get_submodule(at)) is TernaryLora
    assert type(model.get_submodule(at)) is TernaryLinear
    inputs = transformer_inputs(model)
    with torch.no_grad():
        drawn = twin(**inputs)[0]
        assert not torch.equal(drawn, model(**inputs)[0])
        assert torch.equal(copy.deepcopy(twin)(**inputs)[0], drawn)
        layer, x = twin.get_submodule(at), torch.ones(1, 32)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))
    dense = twin.dequantize()
    assert "load_lora_adapter" not in vars(dense)
    assert "fuse_lora" not in vars(dense)
    # The replaced method refers to its model; that must not keep it alive.
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
