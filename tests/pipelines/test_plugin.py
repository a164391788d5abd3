"""Stock diffusers classes read, write and make ternary checkpoints, bit for bit."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel, PipelineQuantizationConfig
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from tritflow import ConfigError, TernaryLinear, TritflowConfig
from tritflow.formats.checkpoint import TernaryFolder, verify_folder
from tritflow.pipelines.loading import configure_, load_pipeline
from tritflow.quantization.ternarize import dequantize, mse_optimal
from tritflow.testing import assert_close, tiny_flux_folder, transformer_inputs


def load(path: Path, **kwargs: Any) -> Any:
    return FluxTransformer2DModel.from_pretrained(path, **kwargs)


def linears(model: nn.Module) -> dict[str, TernaryLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, TernaryLinear)}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found.update(load_file(file))
    return found


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert tensor.dtype == b[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), b[name].view(torch.uint8)), name


@pytest.fixture(scope="module")
def dense(tiny_flux: Path) -> Path:
    return tiny_flux / "transformer"


@pytest.fixture(scope="module")
def ternary(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ternary") / "transformer"
    load(dense, quantization_config=TritflowConfig()).save_pretrained(folder)
    return folder


def test_on_the_fly_rounds_every_block_linear_and_nothing_else(dense: Path) -> None:
    plain, model = load(dense), load(dense, quantization_config=TritflowConfig())
    found = linears(model)
    assert len(found) == 14 + 6  # one double block, one single block
    others = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in found]
    assert all("transformer_blocks." not in name for name in others)
    for name, linear in found.items():
        original = plain.get_submodule(name)
        trits, scale = mse_optimal(original.weight.detach())
        assert torch.equal(linear.trits(), trits)
        assert torch.equal(linear.weight_scale, scale.bfloat16())
        assert torch.equal(linear.bias, original.bias)
    inputs = transformer_inputs(model)
    for name, linear in found.items():
        twin = plain.get_submodule(name)
        twin.weight.data = dequantize(linear.trits(), linear.weight_scale)
    with torch.no_grad():
        assert_close(model(**inputs)[0], plain(**inputs)[0], 1e-4)


def test_skip_and_targets_are_kept_and_said_in_the_config(dense: Path, tmp_path: Path) -> None:
    skip = ("transformer_blocks.0.attn.*",)
    model = load(dense, quantization_config=TritflowConfig(skip=skip, mode="w2a8"))
    assert len(linears(model)) == 20 - 8
    model.save_pretrained(tmp_path)
    assert verify_folder(tmp_path).ternary.skip == skip
    again = load(tmp_path)
    assert set(linears(again)) == set(linears(model))
    assert {m.mode for m in linears(again).values()} == {"w2a8"}
    with pytest.raises(ValueError, match="no linear layer that matches"):
        load(dense, quantization_config=TritflowConfig(targets=("blocks.*",)))


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("column_scale", [False, True])
def test_round_trip_is_bit_exact(dense: Path, tmp_path: Path, packing: str, column_scale: bool) -> None:
    config = TritflowConfig(packing=packing, column_scale=column_scale)
    model = load(dense, quantization_config=config)
    model.save_pretrained(tmp_path / "a")
    again = load(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    first, second = (verify_folder(tmp_path / name) for name in "ab")
    assert first.digest == second.digest
    assert first.ternary == second.ternary == config.ternary
    inputs = transformer_inputs(model)
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], again(**inputs)[0])
    name = "transformer_blocks.0.attn.to_q.weight"
    assert tensors(tmp_path / "a")[name].shape == (32, 7 if packing == "base3" else 32)
    assert linears(again)[name.removesuffix(".weight")].packed.shape == (32, 32)


def test_sharded_round_trip(ternary: Path, tmp_path: Path) -> None:
    load(ternary).save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(tensors(tmp_path), tensors(ternary))
    assert verify_folder(tmp_path).digest == TernaryFolder(ternary).digest
    assert set(load(tmp_path).state_dict()) == set(tensors(ternary))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_survive_every_dtype(ternary: Path, dtype: torch.dtype) -> None:
    stored, model = tensors(ternary), load(ternary, torch_dtype=dtype)
    for name, linear in linears(model).items():
        assert torch.equal(linear.weight_scale, stored[f"{name}.weight_scale"])
        assert torch.equal(linear.packed, stored[f"{name}.weight"])
        assert linear.bias.dtype == dtype
    assert model.x_embedder.weight.dtype == dtype
    assert model.dtype == dtype
    inputs = transformer_inputs(model, dtype=dtype)
    with torch.no_grad():
        assert model(**inputs)[0].dtype == dtype


def test_a_bf16_folder_round_trips_in_bf16(tmp_path: Path) -> None:
    flux = tiny_flux_folder(tmp_path / "flux", dtype=torch.bfloat16, hidden=64, double=2)
    model = load(flux / "transformer", torch_dtype=torch.bfloat16, quantization_config=TritflowConfig())
    model.save_pretrained(tmp_path / "a")
    load(tmp_path / "a", torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "b")
    assert_same(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert verify_folder(tmp_path / "a").digest == verify_folder(tmp_path / "b").digest


def test_what_was_changed_after_loading_is_saved_and_sealed(ternary: Path, tmp_path: Path) -> None:
    model = load(ternary)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.x_embedder.bias.add_(1)
    twin.save_pretrained(tmp_path / "twin")
    model.save_pretrained(tmp_path / "model")
    assert verify_folder(tmp_path / "model").digest == TernaryFolder(ternary).digest
    assert verify_folder(tmp_path / "twin").digest != TernaryFolder(ternary).digest
    assert torch.equal(load(tmp_path / "twin").x_embedder.bias, twin.x_embedder.bias)


def test_saved_files_carry_checksums(ternary: Path) -> None:
    with safe_open(ternary / "diffusion_pytorch_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["tritflow.version"] == "1"
    assert set(json.loads(metadata["tritflow.checksums"])) == set(tensors(ternary))


def test_no_pickle_is_written(ternary: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="safetensors only"):
        load(ternary).save_pretrained(tmp_path, safe_serialization=False)


def test_whole_pipeline_through_stock_classes(tiny_flux: Path, tmp_path: Path) -> None:
    mapping = PipelineQuantizationConfig(quant_mapping={"transformer": TritflowConfig()})
    pipe = FluxPipeline.from_pretrained(tiny_flux, quantization_config=mapping)
    assert len(linears(pipe.transformer)) == 20
    pipe.save_pretrained(tmp_path / "pipe")
    again = FluxPipeline.from_pretrained(tmp_path / "pipe")
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "output_type": "pt"}
    pictures = [p("a star", generator=torch.Generator().manual_seed(0), **settings).images for p in (pipe, again)]
    assert torch.equal(*pictures)
    ours = load_pipeline(tmp_path / "pipe", device="cpu", mode="w2a8", backend="reference")
    assert {(m.mode, m.backend) for m in linears(ours.transformer).values()} == {("w2a8", "reference")}


def test_mode_and_backend_change_how_it_runs_but_not_what_is_stored(ternary: Path, tmp_path: Path) -> None:
    model = load(ternary)
    inputs = transformer_inputs(model)
    with torch.no_grad():
        before = model(**inputs)[0]
        assert configure_(model, mode="w2a8", backend="reference") == 20
        after = model(**inputs)[0]
    assert not torch.equal(before, after)
    assert_close(after, before, 0.05)
    model.save_pretrained(tmp_path)
    assert verify_folder(tmp_path).ternary.mode == "w2a16"
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        configure_(model, backend="referense")


def test_one_config_serves_several_models(dense: Path, tmp_path: Path) -> None:
    config = TritflowConfig()
    other = tiny_flux_folder(tmp_path / "other", seed=4) / "transformer"
    for i, source in enumerate((dense, other)):
        load(source, quantization_config=config).save_pretrained(tmp_path / str(i))
        verify_folder(tmp_path / str(i))
    assert config.digest is None


def test_device_map(ternary: Path) -> None:
    inputs = transformer_inputs(load(ternary))
    with torch.no_grad():
        expected = load(ternary)(**inputs)[0]
        for device_map in ("cpu", {"": "cpu"}, "auto"):
            model = load(ternary, device_map=device_map)
            assert torch.equal(model(**inputs)[0], expected)
    with pytest.raises(ValueError, match="cannot be offloaded to the disk"):
        load(ternary, device_map={"": "disk"}, offload_folder="unused")


def test_automatic_device_map_counts_two_bits(dense: Path, ternary: Path) -> None:
    from accelerate.utils import compute_module_sizes

    model = load(ternary)
    special = model.hf_quantizer.get_special_dtypes_update(model, torch.float32)
    sizes = compute_module_sizes(model, special_dtypes=special)
    name = "transformer_blocks.0.ff.net.0.proj"
    assert sizes[f"{name}.weight"] == 128 * 32 / 4
    assert compute_module_sizes(load(dense))[f"{name}.weight"] == 128 * 32 * 4


def test_model_offload_hooks_run(ternary: Path) -> None:
    from accelerate import cpu_offload_with_hook

    inputs = transformer_inputs(load(ternary))
    with torch.no_grad():
        expected = load(ternary)(**inputs)[0]
        model, hook = cpu_offload_with_hook(load(ternary), execution_device="cpu")
        assert torch.equal(model(**inputs)[0], expected)
        hook.offload()
        assert torch.equal(model(**inputs)[0], expected)


def test_dequantize_gives_a_dense_stock_model(ternary: Path, tmp_path: Path) -> None:
    model = load(ternary)
    inputs = transformer_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
        dense = model.dequantize()
        assert not linears(dense)
        assert_close(dense(**inputs)[0], expected, 1e-4)
    dense.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    with torch.no_grad():
        assert_close(load(tmp_path)(**inputs)[0], expected, 1e-4)


def test_config_round_trips_and_refuses_what_it_does_not_know() -> None:
    config = TritflowConfig(mode="w2a8", skip=("a.*",), packing="base3")
    again = TritflowConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert "base3" in repr(config)
    assert dict(config)["mode"] == "w2a8"
    with pytest.raises(ConfigError, match="did you mean 'w2a8'"):
        TritflowConfig(mode="w2a9")
    with pytest.raises(ConfigError, match="no setting 'modes'"):
        TritflowConfig.from_dict({"quant_method": "tritflow", "modes": 1})
    with pytest.raises(ConfigError, match="upgrade tritflow"):
        TritflowConfig(version=99)


def test_a_subfolder_of_a_pipeline(tiny_flux: Path, ternary: Path, tmp_path: Path) -> None:
    shutil.copytree(ternary, tmp_path / "pipe" / "transformer")
    model = load(tmp_path / "pipe", subfolder="transformer")
    assert len(linears(model)) == 20


def test_blocks_compile_without_a_graph_break(ternary: Path) -> None:
    model = load(ternary)
    assert model.hf_quantizer.is_compileable
    inputs = transformer_inputs(model)
    with torch.no_grad():
        expected = model(**inputs)[0]
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        assert_close(model(**inputs)[0], expected, 1e-5)


def test_weights_go_straight_to_where_the_optimized_forward_wants_them(ternary: Path) -> None:
    """What a CPU can tell of it: where each tensor would go, with and without a device map."""
    from tritflow.models.flux1 import is_modulation
    from tritflow.pipelines.quantizer import TritflowQuantizer, straight_to

    cuda, cpu = torch.device("cuda:0"), torch.device("cpu")
    held, other = "transformer_blocks.0.norm1.linear.weight", "transformer_blocks.0.attn.to_q.weight"
    with straight_to(cuda, is_modulation):
        quantizer = TritflowQuantizer(TritflowConfig())
        mapped = TritflowQuantizer(TritflowConfig())
    after = TritflowQuantizer(TritflowConfig())
    for each in (quantizer, after):
        each.validate_environment(device_map=None)
    mapped.validate_environment(device_map={"": "cpu", "transformer_blocks.0.attn": "cuda:1"})
    assert [quantizer._destination(name, "cpu") for name in (held, other)] == [cpu, cuda]
    assert [mapped._destination(name) for name in (held, other)] == [cpu, torch.device("cuda:1")]
    assert [after._destination(name) for name in (held, other)] == [cpu, cpu]
    assert [q._pinned(held) for q in (quantizer, mapped, after)] == [True, False, False]
    assert not quantizer._pinned(other)


def test_no_tensor_of_a_ternary_layer_keeps_the_file_mapped(ternary: Path) -> None:
    found = linears(load(ternary))
    for name, linear in found.items():
        assert linear.packed.untyped_storage().nbytes() == linear.packed.nbytes, name
        assert linear.weight_scale.untyped_storage().nbytes() == linear.weight_scale.nbytes, name
