"""FLUX.2 through the same commands and stock classes: quantize, load, draw, LoRA, offload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline, Flux2Transformer2DModel

import forked
import tritflow
from tritflow import TernaryLinear, TritflowConfig
from tritflow.formats.checkpoint import verify_folder
from tritflow.pipelines.loading import load_pipeline
from tritflow.pipelines.quantize import QuantizeError
from tritflow.testing import assert_close, dense_twin, relative_error, tiny_flux2_folder, tiny_flux2_transformer

SAME = 1e-4


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux2_folder(tmp_path_factory.mktemp("flux2") / "dense")


@pytest.fixture(scope="module")
def ternary(dense: Path) -> Path:
    out = dense.parent / "ternary"
    report = tritflow.quantize(dense, out, "fast", packing="base3", device="cpu")
    assert report.linears == 12 + 2 * 2
    return out


@pytest.fixture
def klein(ternary: Path) -> Any:
    pipe = Flux2KleinPipeline.from_pretrained(ternary)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "max_sequence_length": 64}
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt="a red star", generator=generator, output_type="pt", **settings).images


def with_transformer(pipe: Any, transformer: Any) -> Any:
    twin = Flux2KleinPipeline(**{**pipe.components, "transformer": transformer}, is_distilled=True)
    twin.set_progress_bar_config(disable=True)
    return twin


def test_equals_the_dense_model(klein: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {n for n, m in klein.transformer.named_modules() if isinstance(m, TernaryLinear)}
    assert "single_transformer_blocks.1.attn.to_qkv_mlp_proj" in names
    assert "single_stream_modulation.linear" not in names
    found = draw(klein)
    assert_close(found, draw(with_transformer(klein, dense_twin(klein.transformer))), SAME)
    monkeypatch.setattr(TernaryLinear, "forward", lambda self, x: x.new_zeros(*x.shape[:-1], self.out_features))
    assert relative_error(draw(klein), found) > 100 * SAME


def test_on_the_fly_saves_and_verifies(dense: Path, tmp_path: Path) -> None:
    model: Any = Flux2Transformer2DModel.from_pretrained(
        dense / "transformer", quantization_config=TritflowConfig(mode="w2a8")
    )
    model.save_pretrained(tmp_path)
    folder = verify_folder(tmp_path)
    assert len(folder.linears) == 16
    again: Any = Flux2Transformer2DModel.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.uint8), again.state_dict()[name].view(torch.uint8))


def test_dev_embeds_its_guidance(klein: Any, tmp_path: Path) -> None:
    tiny_flux2_transformer(guidance=True, seed=2).save_pretrained(tmp_path)
    model: Any = Flux2Transformer2DModel.from_pretrained(tmp_path, quantization_config=TritflowConfig())
    states = torch.randn(1, 8, 48, generator=torch.Generator().manual_seed(0))

    def drawn(transformer: Any, guidance: float) -> torch.Tensor:
        parts = {"scheduler": klein.scheduler, "vae": klein.vae, "text_encoder": None, "tokenizer": None}
        pipe = Flux2Pipeline(**parts, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        settings: dict[str, Any] = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
        generator = torch.Generator().manual_seed(0)
        return pipe(prompt_embeds=states, guidance_scale=guidance, generator=generator, **settings).images

    assert sum(isinstance(m, TernaryLinear) for m in model.modules()) == 16
    assert_close(drawn(model, 4.0), drawn(dense_twin(model), 4.0), SAME)
    assert not torch.equal(drawn(model, 4.0), drawn(model, 1.0))


@pytest.mark.parametrize("style", ["diffusers", "bfl"])
def test_loras(klein: Any, style: str) -> None:
    pytest.importorskip("peft")
    g = torch.Generator().manual_seed(1)
    twin = dense_twin(klein.transformer)
    file = {}
    # Black Forest Labs' names of FLUX.2 -> the modules whose rows they hold, one after the other.
    names = {
        "single_blocks.1.linear1": ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
        "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"],
        "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"],
        "double_blocks.0.txt_mlp.0": ["transformer_blocks.0.ff_context.linear_in"],
    }
    for name, targets in names.items():
        linears = [twin.get_submodule(target) for target in targets]
        a = torch.randn(4, linears[0].in_features, generator=g) * linears[0].in_features ** -0.5
        b = torch.randn(sum(m.out_features for m in linears), 4, generator=g)
        parts = b.split([m.out_features for m in linears])
        for linear, part in zip(linears, parts, strict=True):
            linear.weight.data.add_(part @ a)
        if style == "bfl":
            file |= {f"diffusion_model.{name}.lora_A.weight": a, f"diffusion_model.{name}.lora_B.weight": b}
        else:
            for target, part in zip(targets, parts, strict=True):
                file |= {f"transformer.{target}.lora_A.weight": a, f"transformer.{target}.lora_B.weight": part}
    plain = draw(klein)
    klein.load_lora_weights(file)
    assert relative_error(draw(klein), plain) > 100 * SAME
    assert_close(draw(klein), draw(with_transformer(klein, twin)), SAME)
    with pytest.raises(ValueError, match="cannot be fused into ternary weights"):
        klein.fuse_lora()
    klein.unload_lora_weights()
    assert torch.equal(draw(klein), plain)


@pytest.mark.parametrize("name", ["model", "leaves"])
def test_offloads(klein: Any, name: str) -> None:
    plain = draw(klein)
    if name == "model":
        klein.enable_model_cpu_offload(device="cpu")
    else:
        klein.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    assert torch.equal(draw(klein), plain)


def test_the_house_loads_and_draws_it(dense: Path, ternary: Path, tmp_path: Path) -> None:
    pipe = load_pipeline(ternary, device="cpu")
    assert isinstance(pipe, Flux2KleinPipeline)
    pictures = tritflow.generate(pipe, ["a red star", "a blue ring"], [0, 1])
    assert [p.size for p in pictures] == [(32, 32)] * 2
    assert pictures[0].tobytes() != pictures[1].tobytes()
    # A picture depends on its prompt and seed, not on its neighbours.
    alone = tritflow.generate(pipe, "a blue ring", 1)[0]
    assert max(abs(a - b) for a, b in zip(alone.tobytes(), pictures[1].tobytes(), strict=True)) <= 1
    bare = load_pipeline(ternary / "transformer", base=dense, device="cpu")
    assert tritflow.generate(bare, "a blue ring", 1)[0].tobytes() == alone.tobytes()


@pytest.mark.parametrize("verb", [("inspect",), ("convert", "--packing", "2bit")])
def test_commands_that_load_no_model_know_the_family(ternary: Path, tmp_path: Path, verb: tuple[str, ...]) -> None:
    paths = [str(ternary)] if verb[0] == "inspect" else [str(ternary), str(tmp_path / "out")]
    # A process of its own: families register themselves, and here everything is imported already.
    done = forked.run(["-m", "tritflow.cli.main", verb[0], *paths, *verb[1:]], timeout=60)
    assert done.poll() == 0, done.stderr


def test_recipes_that_run_the_model_are_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(QuantizeError, match=r"FLUX\.1 only, and .* is flux2; take --recipe fast"):
        tritflow.quantize(dense, tmp_path / "out", "demo", device="cpu")
