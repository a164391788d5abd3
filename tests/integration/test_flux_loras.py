"""FLUX LoRAs on a ternary transformer draw what they draw on a dense one of the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from tritflow import TernaryLinear
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.modules import swap_linears_
from tritflow.pipelines.lora import LoraError
from tritflow.pipelines.optimize import optimize
from tritflow.testing import assert_close, dense_twin, relative_error

pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:Already found a `peft_config`")

RANK = 4
HIDDEN = 32
SAME = 1e-4
"""Relative error of pictures in float32: the order of sums is all that differs."""
DOUBLE = "transformer_blocks.0."
SINGLE = "single_transformer_blocks.0."
IMAGE_QKV = [DOUBLE + f"attn.to_{x}" for x in "qkv"]
TEXT_QKV = [DOUBLE + f"attn.add_{x}_proj" for x in "qkv"]
SINGLE_QKV = [SINGLE + f"attn.to_{x}" for x in "qkv"]

Update = dict[str, Tensor]
"""Module name -> what is added to its dense weight, [N, K]."""
Style = tuple[dict[str, Tensor], Update]
"""A LoRA file's tensors, and what they mean."""


def factors(out_features: int, in_features: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """A [r, K] and B [N, r], B not zero."""
    return (
        torch.randn(RANK, in_features, generator=g) * in_features**-0.5,
        torch.randn(out_features, RANK, generator=g),
    )


def diffusers_style(model: nn.Module, seed: int) -> Style:
    """Every block linear, alpha = 2 r; also a linear outside the blocks."""
    g = torch.Generator().manual_seed(seed)
    file, update = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and ("blocks." in name or name == "x_embedder"):
            a, b = factors(module.out_features, module.in_features, g)
            file |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
            file[f"transformer.{name}.alpha"] = torch.tensor(2.0 * RANK)
            update[name] = 2 * b @ a
    return file, update


def fused(
    g: torch.Generator, targets: list[str], model: nn.Module, scale: float = 1.0
) -> tuple[Tensor, Tensor, Update]:
    """One A, one B whose rows are the targets' in order, and the updates they mean."""
    linears = [model.get_submodule(name) for name in targets]
    rows = [linear.out_features for linear in linears]
    a, b = factors(sum(rows), linears[0].in_features, g)
    return a, b, {name: scale * part @ a for name, part in zip(targets, b.split(rows), strict=True)}


def bfl_names(single: bool) -> dict[str, list[str]]:
    """Black Forest Labs' layer names -> diffusers' ones."""
    names = {
        "double_blocks.0.img_attn.qkv": IMAGE_QKV,
        "double_blocks.0.txt_attn.qkv": TEXT_QKV,
        "double_blocks.0.img_attn.proj": [DOUBLE + "attn.to_out.0"],
        "double_blocks.0.txt_attn.proj": [DOUBLE + "attn.to_add_out"],
        "double_blocks.0.img_mlp.0": [DOUBLE + "ff.net.0.proj"],
        "double_blocks.0.img_mlp.2": [DOUBLE + "ff.net.2"],
        "double_blocks.0.txt_mlp.0": [DOUBLE + "ff_context.net.0.proj"],
        "double_blocks.0.img_mod.lin": [DOUBLE + "norm1.linear"],
        "double_blocks.0.txt_mod.lin": [DOUBLE + "norm1_context.linear"],
        "single_blocks.0.linear2": [SINGLE + "proj_out"],
        "single_blocks.0.modulation.lin": [SINGLE + "norm.linear"],
    }
    # diffusers splits `linear1` at FLUX.1-dev's own widths, so that only a real-sized model takes it.
    return names | ({"single_blocks.0.linear1": [*SINGLE_QKV, SINGLE + "proj_mlp"]} if single else {})


def kohya_style(model: nn.Module, seed: int) -> Style:
    g = torch.Generator().manual_seed(seed)
    file, update = {}, {}
    for name, targets in bfl_names(single=False).items():
        key = "lora_unet_" + name.replace(".", "_")
        a, b, means = fused(g, targets, model, scale=0.5)
        file |= {f"{key}.lora_down.weight": a, f"{key}.lora_up.weight": b, f"{key}.alpha": torch.tensor(0.5 * RANK)}
        update |= means
    return file, update


def bfl_style(model: nn.Module, seed: int) -> Style:
    g = torch.Generator().manual_seed(seed)
    file, update = {}, {}
    for name, targets in bfl_names(single=False).items():
        a, b, means = fused(g, targets, model)
        file |= {f"diffusion_model.{name}.lora_down.weight": a, f"diffusion_model.{name}.lora_up.weight": b}
        update |= means
    return file, update


def xlabs_style(model: nn.Module, seed: int) -> Style:
    g = torch.Generator().manual_seed(seed)
    file, update = {}, {}
    for name, targets in {
        "double_blocks.0.processor.qkv_lora1": IMAGE_QKV,
        "double_blocks.0.processor.qkv_lora2": TEXT_QKV,
        "double_blocks.0.processor.proj_lora1": [DOUBLE + "attn.to_out.0"],
        "double_blocks.0.processor.proj_lora2": [DOUBLE + "attn.to_add_out"],
        "single_blocks.0.processor.qkv_lora": SINGLE_QKV,
        "single_blocks.0.processor.proj_lora": [SINGLE + "proj_out"],
    }.items():
        a, b, means = fused(g, targets, model)
        file |= {f"{name}.down.weight": a, f"{name}.up.weight": b}
        update |= means
    return file, update


STYLES = {"diffusers": diffusers_style, "kohya": kohya_style, "bfl": bfl_style, "xlabs": xlabs_style}


def with_update(pipe: Any, *updates: tuple[Update, float]) -> Any:
    """A dense pipeline of the dequantized weights plus the weighted updates."""
    twin = dense_twin(pipe.transformer)
    with torch.no_grad():
        for update, weight in updates:
            for name, delta in update.items():
                twin.get_submodule(name).weight.add_(delta, alpha=weight)
    return FluxPipeline(**{**pipe.components, "transformer": twin, "image_encoder": None, "feature_extractor": None})


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_equals_the_dense_model(pipe: Any, draw: Any, tmp_path: Path, style: str) -> None:
    plain = draw(pipe)
    file, update = STYLES[style](pipe.transformer, seed=1)
    dense = draw(with_update(pipe, (update, 1.0)))
    save_file({k: v.contiguous() for k, v in file.items()}, tmp_path / "lora.safetensors")
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors")
    found = draw(pipe)
    assert relative_error(found, plain) > 0.02
    assert_close(found, dense, SAME)
    assert all(
        isinstance(pipe.transformer.get_submodule(name).base_layer, TernaryLinear | nn.Linear) for name in update
    )


def test_several_weighted_disabled_and_unloaded_to_the_same_bits(pipe: Any, draw: Any) -> None:
    before, plain = bits(pipe.transformer), draw(pipe)
    (one, first), (two, second) = diffusers_style(pipe.transformer, 1), kohya_style(pipe.transformer, 2)
    dense = {
        (1.0, 1.0): draw(with_update(pipe, (first, 1.0), (second, 1.0))),
        (0.5, -1.5): draw(with_update(pipe, (first, 0.5), (second, -1.5))),
        (0.0, 1.0): draw(with_update(pipe, (second, 1.0))),
    }
    pipe.load_lora_weights(one, adapter_name="one")
    pipe.load_lora_weights(two, adapter_name="two")
    for weights, expected in dense.items():
        pipe.set_adapters(["one", "two"], list(weights))
        assert_close(draw(pipe), expected, SAME)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    pipe.set_adapters(["one"], [1.0])
    pipe.delete_adapters(["two"])
    assert_close(draw(pipe), draw(with_update_of_unloaded(pipe, first)), SAME)
    pipe.unload_lora_weights()
    after = bits(pipe.transformer)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8)) for name in before)
    assert torch.equal(draw(pipe), plain)


@pytest.mark.parametrize("style", STYLES)
def test_the_fused_forward_draws_the_same(pipe: Any, draw: Any, style: str, caplog: pytest.LogCaptureFixture) -> None:
    """Loaded, weighed and unloaded while `optimize` is in effect; a scale a call takes the stock forward."""
    (one, first), (two, second) = STYLES[style](pipe.transformer, 1), diffusers_style(pipe.transformer, 2)
    expected = draw(with_update(pipe, (first, 1.0)))
    both = draw(with_update(pipe, (first, 0.5), (second, -0.5)))
    optimize(pipe)
    before, plain = bits(pipe.transformer), draw(pipe)
    pipe.load_lora_weights(one, adapter_name="one")
    assert_close(draw(pipe), expected, SAME)
    pipe.load_lora_weights(two, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -0.5])
    assert_close(draw(pipe), both, SAME)
    pipe.disable_lora()
    assert torch.equal(draw(pipe), plain)
    pipe.enable_lora()
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bits(pipe.transformer).items())
    assert "stock forward" not in caplog.text
    pipe.load_lora_weights(one)
    draw(pipe, joint_attention_kwargs={"scale": 0.25})
    assert "joint_attention_kwargs are given (scale)" in caplog.text


def with_update_of_unloaded(pipe: Any, update: Update) -> Any:
    """`with_update` of a pipeline that has adapters: taken from a copy without them."""
    bare = copy.deepcopy(pipe)
    bare.unload_lora_weights()
    return with_update(bare, (update, 1.0))


def test_a_scale_a_call_weighs_all_adapters(pipe: Any, draw: Any) -> None:
    file, update = diffusers_style(pipe.transformer, 3)
    dense = draw(with_update(pipe, (update, 0.25)))
    pipe.load_lora_weights(file)
    assert_close(draw(pipe, joint_attention_kwargs={"scale": 0.25}), dense, SAME)


def test_eight_bit_activations_carry_the_adapter(pipe: Any, draw: Any) -> None:
    file, update = diffusers_style(pipe.transformer, 4)
    dense = draw(with_update(pipe, (update, 1.0)))
    for layer in (m for m in pipe.transformer.modules() if isinstance(m, TernaryLinear)):
        layer.mode = "w2a8"
    plain = draw(pipe)
    pipe.load_lora_weights(file)
    assert relative_error(draw(pipe), plain) > 0.02
    assert_close(draw(pipe), dense, 0.02)


@pytest.mark.parametrize("safe", [False, True])
def test_fusing_is_refused_before_anything_changes(pipe: Any, draw: Any, safe: bool) -> None:
    file, update = diffusers_style(pipe.transformer, 5)
    dense = draw(with_update(pipe, (update, 1.0)))
    pipe.load_lora_weights(file, adapter_name="a")
    before, drawn = bits(pipe.transformer), draw(pipe)
    with pytest.raises(LoraError, match="cannot be fused into ternary weights") as refused:
        pipe.fuse_lora(adapter_names=["a"], safe_fusing=safe)
    assert "\n" not in str(refused.value)
    after = bits(pipe.transformer)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert torch.equal(draw(pipe), drawn)
    with pytest.raises(LoraError):
        copy.deepcopy(pipe.transformer).fuse_lora()
    # The way out that the message names.
    pipe.transformer.dequantize()
    pipe.fuse_lora(adapter_names=["a"], safe_fusing=safe)
    pipe.unload_lora_weights()
    assert_close(draw(pipe), dense, SAME)


def flux1_dev_on_meta() -> Any:
    """FLUX.1-dev's shapes, its block linears ternary, without memory."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel.from_config(FLUX1_DEV)

    def ternary(_: str, linear: nn.Linear) -> TernaryLinear:
        return TernaryLinear(linear.in_features, linear.out_features, device="meta")

    swap_linears_(transformer, lambda name, _: "blocks." in name, ternary)
    return transformer


@pytest.mark.parametrize("prefix", ["lora_unet_single_blocks_7_linear1", "diffusion_model.single_blocks.7.linear1"])
def test_fused_linears_of_single_blocks_are_split_at_flux1_devs_widths(prefix: str) -> None:
    """The one layer that the tiny model cannot show: its converter knows real widths alone."""
    transformer = flux1_dev_on_meta()
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(RANK, 3072, generator=g), torch.randn(7 * 3072, RANK, generator=g)
    file = {f"{prefix}.lora_down.weight": a, f"{prefix}.lora_up.weight": b, f"{prefix}.alpha": torch.tensor(2.0)}
    state, _, _ = FluxPipeline.lora_state_dict(file, return_alphas=True, return_lora_metadata=True)
    assert not FluxPipeline._maybe_expand_transformer_param_shape_or_error_(transformer, state)
    transformer.load_lora_adapter(state, prefix="transformer", adapter_name="a", low_cpu_mem_usage=True)
    block = "single_transformer_blocks.7"
    names = [f"{block}.attn.to_q", f"{block}.attn.to_k", f"{block}.attn.to_v", f"{block}.proj_mlp"]
    for name, rows in zip(names, b.split([3072, 3072, 3072, 4 * 3072]), strict=True):
        down, up = (state[f"transformer.{name}.lora_{x}.weight"] for x in "AB")
        assert_close(up @ down, 2.0 / RANK * rows @ a, 1e-5)
        layer = transformer.get_submodule(name)
        assert isinstance(layer.base_layer, TernaryLinear)
        assert layer.lora_A["a"].weight.shape == down.shape
        assert layer.lora_B["a"].weight.shape == up.shape


def test_control_lora_of_black_forest_labs_fits_flux1_dev() -> None:
    """Its converter knows FLUX.1-dev's depth and widths alone: here on the meta device, with tensors of rank 2."""
    transformer = flux1_dev_on_meta()
    file: dict[str, Tensor] = {}

    def add(name: str, rows: int, columns: int) -> None:
        file[f"{name}.lora_A.weight"] = torch.ones(2, columns)
        file[f"{name}.lora_B.weight"] = torch.ones(rows, 2)
        file[f"{name}.lora_B.bias"] = torch.ones(rows)

    h = 3072
    for name, width in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        add(f"{name}.in_layer", h, width)
        add(f"{name}.out_layer", h, h)
    add("img_in", h, 128)
    add("txt_in", h, 4096)
    add("final_layer.linear", 64, h)
    add("final_layer.adaLN_modulation.1", 2 * h, h)
    for i in range(19):
        for kind in ("img", "txt"):
            block = f"double_blocks.{i}.{kind}"
            for part, rows, columns in (
                ("mod.lin", 6 * h, h),
                ("attn.qkv", 3 * h, h),
                ("attn.proj", h, h),
                ("mlp.0", 4 * h, h),
                ("mlp.2", h, 4 * h),
            ):
                add(f"{block}_{part}", rows, columns)
            for norm in ("query_norm", "key_norm"):
                file[f"{block}_attn.norm.{norm}.scale"] = torch.ones(128)
    for i in range(38):
        for part, rows, columns in (("modulation.lin", 3 * h, h), ("linear1", 7 * h, h), ("linear2", h, 5 * h)):
            add(f"single_blocks.{i}.{part}", rows, columns)
        for norm in ("query_norm", "key_norm"):
            file[f"single_blocks.{i}.norm.{norm}.scale"] = torch.ones(128)
    state, _, _ = FluxPipeline.lora_state_dict(file, return_alphas=True, return_lora_metadata=True)
    # Its input is twice as wide: that one linear, dense, is replaced, and no ternary one is taken for too narrow.
    loras = {k: v for k, v in state.items() if "lora" in k}
    assert FluxPipeline._maybe_expand_transformer_param_shape_or_error_(transformer, loras)
    assert transformer.x_embedder.in_features == 128
    transformer.load_lora_adapter(loras, prefix="transformer", adapter_name="control", low_cpu_mem_usage=True)
    wrapped = [m for m in transformer.modules() if isinstance(getattr(m, "base_layer", None), TernaryLinear)]
    assert len(wrapped) == 494
    for layer in wrapped:
        assert layer.lora_A["control"].weight.shape == (2, layer.base_layer.in_features)
        assert layer.lora_B["control"].weight.shape == (layer.base_layer.out_features, 2)
