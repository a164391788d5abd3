"""Naming a model: what is found, what is missing, and one line for each."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from tritflow.config import ConfigError
from tritflow.formats.errors import CheckpointError
from tritflow.pipelines.component_sizes import read_sizes
from tritflow.pipelines.loading import (
    DeviceError,
    GenerationDefaults,
    ModelError,
    configure_,
    generation_defaults,
    load_pipeline,
    pick_device,
    pick_dtype,
    resolve_model,
)
from tritflow.pipelines.quantize import plan, quantize
from tritflow.testing import tiny_flux2_folder, tiny_flux_folder


@pytest.fixture
def copy(tiny_flux: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_flux, tmp_path / "flux")


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_pipeline_folder_loads_in_the_dtype_asked_for(tiny_flux: Path) -> None:
    pipe = load_pipeline(tiny_flux, device="cpu", dtype="bfloat16")
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert load_pipeline(tiny_flux, device="cpu").transformer.dtype == torch.float32


def test_defaults_come_from_the_folder(tiny_flux: Path, copy: Path) -> None:
    pipe = load_pipeline(tiny_flux, device="cpu")
    assert generation_defaults(pipe) == GenerationDefaults(32, 32, 2, 3.5, 32)
    (copy / "generation.json").unlink()
    assert GenerationDefaults.read(copy) == GenerationDefaults(1024, 1024, 28, 3.5, 512)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"hieght": 32}', "did you mean 'height'"),
        ('{"height": "32"}', "positive number"),
        ('{"height": 31.5}', "positive number"),
        ('{"num_inference_steps": 0}', "positive number"),
        ("[1]", "not a JSON object"),
        ("{", "not readable as JSON"),
    ],
)
def test_bad_defaults_are_named(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "generation.json").write_text(content)
    with pytest.raises(ModelError, match=said):
        GenerationDefaults.read(tmp_path)


def test_a_bare_transformer_takes_the_rest_from_its_base(tiny_flux: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_flux / "transformer", tmp_path / "own" / "transformer")
    with pytest.raises(ModelError, match="--base"):
        resolve_model(tmp_path / "own")
    source = resolve_model(tmp_path / "own", base=tiny_flux)
    assert (source.pipeline, source.transformer) == (str(tiny_flux), tmp_path / "own" / "transformer")
    (tmp_path / "own" / "meta.json").write_text(json.dumps({"base": str(tiny_flux)}))
    assert resolve_model(tmp_path / "own") == source
    pipe = load_pipeline(tmp_path / "own", device="cpu")
    assert generation_defaults(pipe).height == 32
    with pytest.raises(ModelError, match="only a transformer too"):
        resolve_model(tmp_path / "own", base=tmp_path / "own")


def test_a_near_miss_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    with pytest.raises(ModelError, match="did you mean 'student'"):
        resolve_model(tmp_path / "studnet")


def test_a_hub_id_is_left_to_diffusers() -> None:
    assert resolve_model("some-owner/some-model.v1").pipeline == "some-owner/some-model.v1"
    with pytest.raises(ModelError, match="cannot load 'some-owner/none'"):  # HF_HUB_OFFLINE in conftest
        load_pipeline("some-owner/none", device="cpu")


def test_other_families_are_refused(copy: Path) -> None:
    edit(copy / "model_index.json", _class_name="StableDiffusionPipeline")
    with pytest.raises(ModelError, match="StableDiffusionPipeline; tritflow runs FluxPipeline"):
        load_pipeline(copy)
    edit(copy / "transformer" / "config.json", _class_name="SD3Transformer2DModel")
    with pytest.raises(ModelError, match="SD3Transformer2DModel"):
        load_pipeline(copy / "transformer")


def test_pickles_are_refused_unread(copy: Path, tmp_path: Path) -> None:
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model.bin is a pickle"):
        load_pipeline(copy)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04")
    with pytest.raises(ModelError, match="pickle"):
        load_pipeline(tmp_path / "model.ckpt")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        load_pipeline(tmp_path / "bin")


def test_missing_pieces_are_named(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"neither model_index\.json nor transformer"):
        load_pipeline(tmp_path / "empty")
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="tritflow quantize"):
        load_pipeline(tmp_path / "model.safetensors")
    shutil.rmtree(copy / "vae")
    with pytest.raises(ModelError, match="cannot load"):
        load_pipeline(copy, device="cpu")


def test_a_truncated_file_is_named_before_loading(copy: Path) -> None:
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"vae/diffusion_pytorch_model.safetensors"):
        load_pipeline(copy)


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch, tiny_flux: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device cpu"):
        load_pipeline(tiny_flux, device="cuda")
    with pytest.raises(DeviceError, match="unknown device 'gpu'"):
        pick_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto") == torch.device("cuda")
    with pytest.raises(DeviceError, match="only 1 CUDA"):
        pick_device("cuda:3")
    assert pick_dtype(None, torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) == torch.float32
    with pytest.raises(ModelError, match="did you mean 'bfloat16'"):
        pick_dtype("bfloat", torch.device("cpu"))


def test_overrides_need_a_ternary_model(tiny_flux: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'w2a8'"):
        load_pipeline(tiny_flux, mode="w2a9", device="cpu")
    pipe = load_pipeline(tiny_flux, device="cpu")
    with pytest.raises(ModelError, match="dense"):
        configure_(pipe, mode="w2a8")


def test_defaults_without_a_file_follow_the_kind_of_model(tmp_path: Path) -> None:
    schnell = tiny_flux_folder(tmp_path / "schnell", guidance=False)
    (schnell / "generation.json").unlink()
    assert generation_defaults(load_pipeline(schnell, device="cpu")) == GenerationDefaults(1024, 1024, 4, 0.0, 256)
    klein = tiny_flux2_folder(tmp_path / "klein")
    assert generation_defaults(load_pipeline(klein, device="cpu")).num_inference_steps == 2
    (klein / "generation.json").unlink()
    pipe = load_pipeline(klein, device="cpu")
    assert generation_defaults(pipe) == GenerationDefaults(1024, 1024, 4, 1.0, 512)
    pipe.register_to_config(is_distilled=False)
    assert generation_defaults(pipe) == GenerationDefaults(1024, 1024, 50, 4.0, 512)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for the hub: `hub/owner--name` is the repository `owner/name`."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repository: str, name: str, **_: object) -> str:
        file = tmp_path / repository.replace("/", "--") / name
        if not file.is_file():
            raise LocalEntryNotFoundError("no such file")
        return str(file)

    def snapshot(repository: str, **kwargs: list[str]) -> str:
        folder = tmp_path / repository.replace("/", "--")
        if not folder.is_dir():
            raise LocalEntryNotFoundError("no such repository")
        fetched = tmp_path / "cache" / folder.name
        patterns = kwargs["allow_patterns"]
        for file in (p for p in folder.rglob("*") if p.is_file()):
            name = str(file.relative_to(folder))
            if any(fnmatch(name, pattern) for pattern in patterns):
                (fetched / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, fetched / name)
        return str(fetched)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    return tmp_path


def test_a_hub_ids_own_settings_are_fetched(hub: Path, tiny_flux: Path) -> None:
    pipe = load_pipeline(tiny_flux, device="cpu")
    pipe.register_to_config(_name_or_path="owner/name")  # as diffusers leaves it
    assert generation_defaults(pipe) == GenerationDefaults()
    shutil.copytree(tiny_flux, hub / "owner--name")
    assert generation_defaults(pipe) == GenerationDefaults(32, 32, 2, 3.5, 32)


def test_memory_is_planned_from_a_hub_ids_configs(hub: Path, tiny_flux: Path) -> None:
    shutil.copytree(tiny_flux, hub / "owner--name")
    for weights in (hub / "owner--name").rglob("*.safetensors"):
        weights.unlink()
    found = read_sizes(resolve_model("owner/name"), torch.float32)
    assert found == read_sizes(resolve_model(tiny_flux), torch.float32)


def test_a_hub_id_may_hold_a_transformer_alone(hub: Path, tiny_flux: Path) -> None:
    quantize(tiny_flux, hub / "made", "absmean", device="cpu")
    shutil.copytree(hub / "made" / "transformer", hub / "owner--bare" / "transformer")
    with pytest.raises(ModelError, match="--base"):
        load_pipeline("owner/bare", device="cpu")
    pipe = load_pipeline("owner/bare", base=tiny_flux, device="cpu", mode="w2a8")
    assert generation_defaults(pipe).height == 32
    (hub / "owner--bare" / "meta.json").write_text(json.dumps({"base": str(tiny_flux)}))
    assert load_pipeline("owner/bare", device="cpu").transformer.dtype == torch.float32


def test_quantizing_a_hub_id_finds_its_prompts_and_keeps_its_settings(hub: Path, tiny_flux: Path) -> None:
    shutil.copytree(tiny_flux, hub / "owner--name")
    (hub / "owner--name" / "calibration_prompts.txt").write_text("a red star\na blue ring\n")
    (hub / "owner--name" / "single_file.safetensors").write_bytes(b"a copy of everything")
    job = plan("owner/name", "demo", device="cpu")
    assert job.prompts is not None
    assert job.prompts.texts == ["a red star", "a blue ring"]
    assert not (hub / "cache" / "owner--name" / "single_file.safetensors").exists()
    quantize("owner/name", hub / "out", "absmean", device="cpu")
    assert GenerationDefaults.read(hub / "out").height == 32
