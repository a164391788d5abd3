"""Dense checkpoints under every name and dtype that finetunes are shipped in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_ternary import CONFIG

from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.errors import CheckpointError
from tritflow.formats.locate import resolve, resolve_transformer
from tritflow.formats.single_file import bfl_pieces, swap_halves, to_bfl
from tritflow.formats.source import open_source

WIDE = {**CONFIG, "attention_head_dim": 128, "num_attention_heads": 1, "axes_dims_rope": [16, 56, 56]}


def dense(config: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in flux1_shapes(config).items()}


def dense_folder(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any] = CONFIG) -> Path:
    path.mkdir(parents=True)
    save_file(tensors, path / "diffusion_pytorch_model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return path


def test_names_and_shapes_are_those_of_stock_diffusers() -> None:
    from diffusers import FluxTransformer2DModel

    for config in (
        CONFIG,
        FLUX1_DEV,
        {**FLUX1_DEV, "guidance_embeds": False, "in_channels": 384, "out_channels": 64},
    ):
        with torch.device("meta"):
            model = FluxTransformer2DModel(**{k: v for k, v in config.items() if not k.startswith("_")})
        assert {n: tuple(t.shape) for n, t in model.state_dict().items()} == flux1_shapes(config)
    assert sum(torch.Size(s).numel() for s in flux1_shapes(FLUX1_DEV).values()) == 11_901_408_320


def test_split_rules_equal_diffusers_own_converter() -> None:
    """The converter fixes hidden = 3072 and looks at rows only, so one column a weight is enough."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers

    config = {**FLUX1_DEV, "num_layers": 2, "num_single_layers": 2}
    rows: dict[str, int] = {}
    for piece in bfl_pieces(config).values():
        rows[piece.source] = max(rows.get(piece.source, 0), piece.stop)
    theirs = {n: torch.randn(r) if n.endswith(("bias", "scale")) else torch.randn(r, 1) for n, r in rows.items()}
    expected = convert_flux_transformer_checkpoint_to_diffusers(dict(theirs))
    ours = {}
    for name, piece in bfl_pieces(config).items():
        part = theirs[piece.source][piece.start : piece.stop]
        ours[name] = swap_halves(part) if piece.swapped else part
    assert set(ours) == set(expected)
    assert all(torch.equal(ours[n], expected[n]) for n in ours)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_single_file_gives_back_the_diffusers_tensors(tmp_path: Path, prefix: str, dtype: torch.dtype) -> None:
    tensors = dense(WIDE, dtype)
    fused = {prefix + n: t for n, t in to_bfl(WIDE, tensors.__getitem__).items()}
    if prefix:
        fused["vae.decoder.weight"] = torch.zeros(2)
    save_file(fused, tmp_path / "tune.safetensors")
    source = open_source(tmp_path / "tune.safetensors")
    assert {k: v for k, v in source.config.items() if v != WIDE.get(k)} == {}
    assert source.names() == list(tensors)
    for name, tensor in tensors.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.tensor(name), tensor), name


def test_single_file_with_diffusers_names(tmp_path: Path) -> None:
    tensors = dense(WIDE)
    save_file(tensors, tmp_path / "tune.safetensors")
    source = open_source(tmp_path / "tune.safetensors")
    assert source.config["num_single_layers"] == 2
    assert all(torch.equal(source.tensor(n), t) for n, t in tensors.items())


@pytest.mark.parametrize("style", ["plain", "scale_weight", "weight_scale", "rows"])
def test_fp8_single_files(tmp_path: Path, style: str) -> None:
    tensors = dense(WIDE)
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for i, (name, tensor) in enumerate(to_bfl(WIDE, tensors.__getitem__).items()):
        if not name.endswith(".weight"):
            stored[name] = expected[name] = tensor
            continue
        stored[name] = tensor.to(torch.float8_e4m3fn)
        scale = torch.tensor(0.5 + 0.01 * i)
        if style == "rows":
            scale = torch.linspace(0.5, 2, tensor.shape[0])[:, None]
        if style == "plain":
            expected[name] = stored[name].to(torch.bfloat16)
        else:
            stored[name.replace(".weight", ".scale_weight" if style == "scale_weight" else ".weight_scale")] = scale
            expected[name] = (stored[name].float() * scale).to(torch.bfloat16)
    if style == "scale_weight":
        stored["scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        stored["img_in.scale_input"] = torch.tensor(1.0)
    save_file(stored, tmp_path / "fp8.safetensors")
    source = open_source(tmp_path / "fp8.safetensors")
    again = to_bfl(WIDE, source.tensor)
    assert all(torch.equal(again[n], t) and again[n].dtype == t.dtype for n, t in expected.items())
    assert torch.equal(
        source.tensor("norm_out.linear.weight"), swap_halves(expected["final_layer.adaLN_modulation.1.weight"])
    )


def test_folders_sharded_and_whole_and_pipelines(tmp_path: Path) -> None:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**{k: v for k, v in CONFIG.items() if not k.startswith("_")})
    pipeline = tmp_path / "flux"
    model.save_pretrained(pipeline / "transformer", max_shard_size="40KB")
    (pipeline / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    model.save_pretrained(tmp_path / "whole")
    assert len(list((pipeline / "transformer").glob("*.safetensors"))) > 1
    state = model.state_dict()
    for path in (pipeline, pipeline / "transformer", tmp_path / "whole"):
        source = open_source(path)
        assert source.config["num_layers"] == 1
        assert source.names() == list(flux1_shapes(CONFIG))
        assert all(torch.equal(source.tensor(n), state[n]) for n in source.names())
    assert resolve(pipeline / "transformer").pipeline == resolve(pipeline).pipeline == pipeline
    assert resolve_transformer(tmp_path / "whole") == tmp_path / "whole"
    assert open_source(pipeline).fingerprint() == open_source(pipeline / "transformer").fingerprint()


def test_fingerprint_tells_finetunes_apart(tmp_path: Path) -> None:
    a = open_source(dense_folder(tmp_path / "a", dense(CONFIG))).fingerprint()
    b = open_source(dense_folder(tmp_path / "b", {n: t * 1.01 for n, t in dense(CONFIG).items()})).fingerprint()
    assert a != b


def check_refused(path: Path | str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(path)
    assert "\n" not in str(caught.value)


def test_other_things_are_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_refused(tmp_path / "nothing", "does not exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    check_refused(empty, "neither model_index.json nor config.json")

    sd = tmp_path / "sd"
    sd.mkdir()
    (sd / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline", "unet": ["a", "b"]}))
    check_refused(sd, "StableDiffusionPipeline, not a FLUX pipeline")

    check_refused(
        dense_folder(tmp_path / "sd3", dense(CONFIG), {**CONFIG, "_class_name": "SD3Transformer2DModel"}), "SD3"
    )
    quantized = {**CONFIG, "quantization_config": {"quant_method": "bitsandbytes"}}
    check_refused(dense_folder(tmp_path / "nf4", dense(CONFIG), quantized), r"quantized already \(bitsandbytes\)")

    missing = dense(CONFIG)
    del missing["x_embedder.bias"]
    check_refused(dense_folder(tmp_path / "hole", missing), "'x_embedder.bias' is missing")
    check_refused(dense_folder(tmp_path / "shape", dense(CONFIG), {**CONFIG, "in_channels": 4}), "has shape")
    extra = {**dense(CONFIG), "distilled_guidance_layer.weight": torch.zeros(2)}
    check_refused(dense_folder(tmp_path / "extra", extra), "unknown to this config")


def test_single_files_that_are_something_else(tmp_path: Path) -> None:
    fused = to_bfl(WIDE, dense(WIDE).__getitem__)

    def refused(tensors: dict[str, torch.Tensor], message: str) -> None:
        save_file(tensors, tmp_path / "x.safetensors")
        check_refused(tmp_path / "x.safetensors", message)

    refused({"a.weight": torch.zeros(2)}, "not a FLUX.1 transformer: it has no 'img_in.weight'")
    refused({"lora_unet_double_blocks_0.lora_down.weight": torch.zeros(2)}, "is a LoRA")
    refused({**fused, "distilled_guidance_layer.x": torch.zeros(2)}, "belongs to no FLUX.1 transformer")
    refused(
        {k: v for k, v in fused.items() if k != "single_blocks.0.linear1.bias"}, "'single_blocks.0.linear1.bias' is"
    )
    refused({**fused, "img_in.weight": fused["img_in.weight"].to(torch.int8)}, "stored as I8")
    refused({**fused, "img_in.weight.quant_state.bitsandbytes__nf4": torch.zeros(2)}, "is quantized")
    narrow = to_bfl(CONFIG, dense(CONFIG).__getitem__)
    refused(narrow, "heads are 12 wide")
    save_file(narrow, tmp_path / "y.safetensors")
    source = open_source(tmp_path / "y.safetensors", config=CONFIG)
    assert torch.equal(source.tensor("proj_out.weight"), dense(CONFIG)["proj_out.weight"])


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.ckpt", "model.pth"])
def test_pickles_are_refused_by_name_unread(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"never read")
    check_refused(tmp_path / name, "is a pickle by its name")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / f"diffusion_pytorch_{name}").write_bytes(b"never read")
    check_refused(folder, "is a pickle by its name")


def test_pickle_content_is_refused_under_any_name(tmp_path: Path) -> None:
    import pickle

    torch.save({"img_in.weight": torch.zeros(2)}, tmp_path / "zip.safetensors")
    check_refused(tmp_path / "zip.safetensors", "holds a pickle")
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps({"a": list(range(100))}))
    check_refused(tmp_path / "raw.safetensors", "holds a pickle")


def test_header_lengths_that_look_like_a_pickle_are_read(tmp_path: Path) -> None:
    from tritflow.formats.safetensors_file import SafetensorsFile

    for length in (0x4B50, 0x0280, 0x0480):  # "PK", and two pickle protocol openings
        header = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
        (tmp_path / "x.safetensors").write_bytes(length.to_bytes(8, "little") + header + b"\7")
        assert SafetensorsFile(tmp_path / "x.safetensors").tensor("a").tolist() == [7]


def test_hub_names_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    class GatedRepoError(Exception):
        pass

    def offline(*args: Any, **kwargs: Any) -> str:
        raise ConnectionError("no route")

    def gated(*args: Any, **kwargs: Any) -> str:
        raise GatedRepoError("403")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    check_refused("org/name", r"fetching it from the hub failed \(ConnectionError\): check the name and the network")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", gated)
    check_refused("org/name", "accept its licence")
    folder = dense_folder(tmp_path / "cache", dense(CONFIG))
    seen: dict[str, Any] = {}

    def fetched(repository: str, **kwargs: Any) -> str:
        seen.update(kwargs, repository=repository)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetched)
    assert open_source("org/name").path == folder
    assert seen["repository"] == "org/name"
    assert not any(p.endswith((".bin", ".ckpt", ".pt")) or p == "*.safetensors" for p in seen["allow_patterns"])


def test_a_flux2_single_file_is_told_from_flux1(tmp_path: Path) -> None:
    save_file({"double_stream_modulation_img.lin.weight": torch.zeros(6, 1)}, tmp_path / "klein.safetensors")
    check_refused(tmp_path / "klein.safetensors", "is a FLUX.2 transformer in one file; give its diffusers folder")
