"""Damaged checkpoints through stock `from_pretrained`: a clear error, never a silently wrong model.

The thousands of mutations are in tests/formats; these few prove that the loading path of diffusers asks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from tritflow import TritflowConfig
from tritflow.formats.errors import CheckpointError
from tritflow.testing import tiny_flux_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sound(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "transformer"
    model: Any = FluxTransformer2DModel.from_pretrained(tiny_flux / "transformer", quantization_config=TritflowConfig())
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "transformer")


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def configure(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"].update(changes)
    (path / "config.json").write_text(json.dumps(config))


def resave(path: Path, change: Callable[[dict[str, torch.Tensor]], None], *, keep_metadata: bool) -> None:
    """Rewrite the weights through the public library, as a careless tool would."""
    from safetensors import safe_open

    tensors = load_file(path / WEIGHTS)
    with safe_open(path / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata=metadata if keep_metadata else {"format": "pt"})


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 1.0])
def test_a_flipped_bit_is_named(folder: Path, share: float) -> None:
    size = (folder / WEIGHTS).stat().st_size
    header = int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little") + 8
    flip(folder / WEIGHTS, int(header + (size - header - 1) * share))
    with pytest.raises(CheckpointError, match=r"tensor '\S+' does not match its checksum.*tritflow inspect"):
        FluxTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize("position", [3, 9, 60])
def test_a_damaged_header_is_refused(folder: Path, position: int) -> None:
    flip(folder / WEIGHTS, position)
    with pytest.raises((CheckpointError, OSError)):
        FluxTransformer2DModel.from_pretrained(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    for size in (0, 5, 1000, len(data) - 1):
        (folder / WEIGHTS).write_bytes(data[:size])
        with pytest.raises((CheckpointError, OSError)):
            FluxTransformer2DModel.from_pretrained(folder)


def test_without_checksums_the_digest_still_tells(folder: Path) -> None:
    resave(folder, lambda t: None, keep_metadata=False)
    with pytest.raises(CheckpointError):  # in_features and architecture went with the metadata
        FluxTransformer2DModel.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t["x_embedder.bias"].add_(1), "x_embedder.bias"),
        (lambda t: t.pop("x_embedder.bias"), "x_embedder.bias"),
        (lambda t: t.pop("transformer_blocks.0.attn.to_q.weight_scale"), "attn.to_q"),
        (lambda t: t.update(extra=torch.zeros(3)), "extra"),
    ],
)
def test_changed_lost_or_added_tensors_are_named(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], None], said: str
) -> None:
    resave(folder, change, keep_metadata=True)
    with pytest.raises(CheckpointError, match=said):
        FluxTransformer2DModel.from_pretrained(folder)


def test_a_shard_of_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    source = tiny_flux_folder(tmp_path / "other", seed=8) / "transformer"
    for name, path in (("a", folder), ("b", source)):
        config = None if name == "a" else TritflowConfig()
        model: Any = FluxTransformer2DModel.from_pretrained(path, quantization_config=config)
        model.save_pretrained(tmp_path / name, max_shard_size="100KB")
    shard = sorted((tmp_path / "a").glob("*-of-*.safetensors"))[1].name
    shutil.copy(tmp_path / "b" / shard, tmp_path / "a" / shard)
    with pytest.raises(CheckpointError, match="another model"):
        FluxTransformer2DModel.from_pretrained(tmp_path / "a")
    (tmp_path / "a" / shard).unlink()
    with pytest.raises((CheckpointError, OSError)):
        FluxTransformer2DModel.from_pretrained(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 99}, "newer than this tritflow"),
        ({"digest": "0" * 64}, "digest"),
        ({"digest": None}, "digest"),
        ({"digest": "xyz"}, "digest"),
        ({"packing": "base3"}, "base3"),
        ({"column_scale": True}, "input_scale"),
        ({"targets": ["single_transformer_blocks.*"]}, "transformer_blocks.0"),
        ({"mode": "w4a4"}, "w4a4"),
        ({"colour": 1}, "colour"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(folder: Path, changes: dict[str, Any], said: str) -> None:
    configure(folder, **changes)
    with pytest.raises(ValueError, match=said):
        FluxTransformer2DModel.from_pretrained(folder)


def test_a_pickle_under_the_weights_name_is_refused(folder: Path) -> None:
    torch.save({"x_embedder.weight": torch.zeros(2)}, folder / WEIGHTS)
    with pytest.raises((CheckpointError, OSError)):
        FluxTransformer2DModel.from_pretrained(folder)


def test_a_pickle_in_place_of_the_weights_is_refused(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match="pickle"):
        FluxTransformer2DModel.from_pretrained(folder)


def test_damage_inside_a_pipeline_is_found_by_the_stock_pipeline(tiny_flux: Path, folder: Path, tmp_path: Path) -> None:
    pipe = shutil.copytree(tiny_flux, tmp_path / "pipe")
    shutil.rmtree(pipe / "transformer")
    shutil.copytree(folder, pipe / "transformer")
    FluxPipeline.from_pretrained(pipe)
    flip(pipe / "transformer" / WEIGHTS, (folder / WEIGHTS).stat().st_size - 40)
    with pytest.raises(CheckpointError, match="checksum"):
        FluxPipeline.from_pretrained(pipe)
