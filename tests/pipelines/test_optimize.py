"""`optimize` and `deoptimize` on whole pipelines."""

from __future__ import annotations

import logging

import pytest
import torch

import tritflow
from tritflow.modules import TernaryLinear
from tritflow.pipelines.generate import generate
from tritflow.pipelines.loading import ModelError, configure_, load_pipeline, load_transformer
from tritflow.pipelines.optimize import OptimizeError, deoptimize, is_optimized, optimize
from tritflow.testing import assert_close


@pytest.fixture(scope="module")
def folder(tiny_flux, tmp_path_factory):
    """A ternary pipeline folder made from the tiny FLUX."""
    from tritflow.pipelines.quantize import quantize

    out = tmp_path_factory.mktemp("optimize") / "ternary"
    quantize(tiny_flux, out, recipe="absmean")
    return out


def _pipe(folder, mode="w2a16"):
    pipe = load_pipeline(folder, device="cpu", mode=mode)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return pipe(
        "a red circle", height=32, width=32, num_inference_steps=3, generator=generator, output_type="latent", **kwargs
    ).images


@pytest.mark.parametrize(("mode", "tolerance"), [("w2a16", 1e-4), ("w2a8", 5e-3)])
def test_a_pipeline_draws_the_same(folder, mode, tolerance):
    pipe = _pipe(folder, mode)
    expected = _latents(pipe)
    assert tritflow.optimize(pipe) is pipe
    assert is_optimized(pipe)
    found = _latents(pipe)
    assert_close(found, expected, tolerance)
    assert torch.equal(_latents(pipe), found)
    assert tritflow.deoptimize(pipe) is pipe
    assert not is_optimized(pipe)
    assert "forward" not in pipe.transformer.__dict__
    assert torch.equal(_latents(pipe), expected)
    assert deoptimize(pipe) is pipe


def test_modulation_is_computed_once_a_generation(folder, monkeypatch):
    pipe = optimize(_pipe(folder, "w2a8"))
    modulation = pipe.transformer.__dict__["_tritflow_fused"].modulation
    calls = []
    compute = modulation.compute
    monkeypatch.setattr(modulation, "compute", lambda *a: calls.append(len(a[0])) or compute(*a))
    _latents(pipe)
    assert calls == [3]
    _latents(pipe, num_images_per_prompt=2)
    assert calls == [3, 6]


def test_true_guidance_keeps_two_conditionings(folder):
    pipe = _pipe(folder)
    kwargs = {"negative_prompt": "a blue square", "true_cfg_scale": 2.0}
    expected = _latents(pipe, **kwargs)
    assert_close(_latents(optimize(pipe), **kwargs), expected, 1e-4)


def test_it_follows_a_changed_mode(folder):
    pipe = optimize(_pipe(folder))
    configure_(pipe, mode="w2a8")
    other = _pipe(folder, "w2a8")
    assert_close(_latents(pipe), _latents(other), 5e-3)


def test_a_saved_model_is_the_same_before_and_after(folder, tmp_path):
    pipe = optimize(_pipe(folder))
    pipe.transformer.save_pretrained(tmp_path / "a")
    from safetensors.torch import load_file

    before = load_file(next((folder / "transformer").glob("*.safetensors")))
    after = load_file(next((tmp_path / "a").glob("*.safetensors")))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name].to(tensor.dtype)), name


def test_moving_is_part_of_it(folder):
    pipe = _pipe(folder)
    assert_close(_latents(optimize(pipe, device="cpu")), _latents(_pipe(folder)), 1e-4)
    for block in pipe.transformer.transformer_blocks:
        assert isinstance(block.norm1.linear, TernaryLinear)


def _bytes(images):
    return [image.tobytes() for image in images]


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_a_seed_draws_the_same_picture_bit_for_bit(folder, mode):
    """Whole generations: twice by one pipeline, by one loaded again, and by one loaded for the optimized forward."""
    prompts, seeds = ["a red circle", "two blue stars"], [7, 8]

    def draw(pipe):
        return _bytes(generate(pipe, prompts, seeds, height=32, width=32, num_inference_steps=3, batch_size=2))

    pipe = optimize(_pipe(folder, mode))
    first = draw(pipe)
    assert first[0] != first[1]
    assert draw(pipe) == first
    assert draw(optimize(_pipe(folder, mode))) == first
    loaded = load_pipeline(folder, device="cpu", mode=mode, optimized=True)
    assert is_optimized(loaded)
    assert draw(loaded) == first


def test_loading_for_the_optimized_forward(folder):
    model = load_transformer(folder / "transformer", torch.float32, "cpu", optimized=True)
    assert is_optimized(model)
    with pytest.raises(ModelError, match="needs a device"):
        load_transformer(folder / "transformer", torch.float32, optimized=True)
    with pytest.raises(ModelError, match="either a memory plan or optimize"):
        load_pipeline(folder, device="cpu", optimized=True, plan=object())


def test_lora_draws_on_the_fused_forward(folder, caplog):
    peft = pytest.importorskip("peft")
    pipe = _pipe(folder)
    plain = _latents(pipe)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    expected = _latents(pipe)
    assert not torch.allclose(expected, plain, atol=1e-3)
    with caplog.at_level(logging.WARNING, logger="tritflow"):
        optimize(pipe)
        assert_close(_latents(pipe), expected, 1e-4)
        pipe.transformer.unload_lora()
        assert_close(_latents(pipe), plain, 1e-4)
        torch.manual_seed(0)
        pipe.transformer.add_adapter(config)
        assert_close(_latents(pipe), expected, 1e-4)
    assert "stock forward" not in caplog.text


def test_an_adapter_that_is_no_lora_is_refused(folder):
    peft = pytest.importorskip("peft")
    pipe = _pipe(folder)
    peft.inject_adapter_in_model(peft.LoHaConfig(r=2, target_modules=["x_embedder"]), pipe.transformer)
    with pytest.raises(
        OptimizeError, match=r"keeps its stock forward: an adapter that is no plain LoRA.* at x_embedder"
    ):
        optimize(pipe)


def test_models_it_cannot_take_are_refused(tiny_flux, folder):
    with pytest.raises(OptimizeError, match=r"no ternary layer; make one with `tritflow quantize`"):
        optimize(load_pipeline(tiny_flux, device="cpu"))
    pipe = _pipe(folder)
    pipe.transformer.forward = pipe.transformer.forward
    with pytest.raises(OptimizeError, match="wrapped already"):
        optimize(pipe)


def test_generate_works_on_an_optimized_pipeline(folder):
    pipe = optimize(_pipe(folder))
    images = list(generate(pipe, ["a red circle"], [0], height=32, width=32, num_inference_steps=2))
    assert len(images) == 1
