"""`tritflow convert`: lossless both ways, resumable, never onto something else. And `tritflow inspect`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tiny_ternary import folder_bytes, write_tiny
from typer.testing import CliRunner

from tritflow.config import TernaryConfig
from tritflow.formats.checkpoint import CheckpointError, verify_folder
from tritflow.formats.packing import unpack
from tritflow.formats.repacking import convert_folder


def run(*arguments: str) -> Any:
    from tritflow.cli.main import app

    return CliRunner().invoke(app, list(arguments))


def flip_last_bit(folder: Path) -> None:
    file = folder / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("column_scale", [False, True])
def test_there_and_back_is_the_same_file(tmp_path: Path, column_scale: bool) -> None:
    write_tiny(tmp_path / "a", TernaryConfig(column_scale=column_scale))
    convert_folder(tmp_path / "a", tmp_path / "b", "base3")
    convert_folder(tmp_path / "b", tmp_path / "c", "2bit")
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "c")
    write_tiny(tmp_path / "direct", TernaryConfig(column_scale=column_scale, packing="base3"))
    assert folder_bytes(tmp_path / "b") == folder_bytes(tmp_path / "direct")
    a, b = verify_folder(tmp_path / "a"), verify_folder(tmp_path / "b")
    for name, in_features in a.linears.items():
        trits = unpack(a.linear(name).packed, in_features, "2bit")
        assert trits.equal(unpack(b.linear(name).packed, in_features, "base3"))


def test_pipelines_are_copied_whole_and_again_is_harmless(tmp_path: Path) -> None:
    write_tiny(tmp_path / "p" / "transformer")
    (tmp_path / "p" / "model_index.json").write_text(
        json.dumps({"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]})
    )
    (tmp_path / "p" / "tokenizer").mkdir()
    (tmp_path / "p" / "tokenizer" / "vocab.txt").write_text("a\n")
    digest = verify_folder(tmp_path / "p" / "transformer").digest
    (tmp_path / "p" / "meta.json").write_text(json.dumps({"kind": "ternary", "digest": digest}, indent=2) + "\n")
    assert convert_folder(tmp_path / "p", tmp_path / "q", "base3") == tmp_path / "q" / "transformer"
    before = folder_bytes(tmp_path / "q")
    assert set(before) == set(folder_bytes(tmp_path / "p"))
    assert verify_folder(tmp_path / "q" / "transformer").ternary.packing == "base3"
    made = verify_folder(tmp_path / "q" / "transformer")
    assert json.loads((tmp_path / "q" / "meta.json").read_text()) == {"kind": "ternary", "digest": made.digest}
    convert_folder(tmp_path / "p", tmp_path / "q", "base3")
    assert folder_bytes(tmp_path / "q") == before
    # What a further distillation starts from belongs to the source's bytes.
    (tmp_path / "p" / "latents.safetensors").write_bytes(b"of the source")
    convert_folder(tmp_path / "p", tmp_path / "r", "base3")
    assert folder_bytes(tmp_path / "r") == before
    convert_folder(tmp_path / "q", tmp_path / "back", "2bit")
    assert folder_bytes(tmp_path / "back") | folder_bytes(tmp_path / "p") == folder_bytes(tmp_path / "p")


def test_wrong_targets_and_sources_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    write_tiny(tmp_path / "other", seed=2)
    with pytest.raises(CheckpointError, match="is the source itself"):
        convert_folder(tmp_path / "a", tmp_path / "a", "base3")
    with pytest.raises(CheckpointError, match="already holds another ternary model"):
        convert_folder(tmp_path / "a", tmp_path / "other", "2bit")
    with pytest.raises(CheckpointError, match="already holds another ternary model"):
        convert_folder(tmp_path / "a", tmp_path / "other", "base3")
    damaged = tmp_path / "damaged"
    shutil.copytree(tmp_path / "a", damaged)
    flip_last_bit(damaged)
    with pytest.raises(CheckpointError, match="does not match its checksum"):
        convert_folder(damaged, tmp_path / "out", "base3")
    assert not (tmp_path / "out" / "config.json").exists()


def test_commands(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a")
    shown = run("inspect", str(tmp_path / "a"))
    assert shown.exit_code == 0, shown.output
    assert "26 ternary layers" in shown.stdout
    assert "transformer_blocks.*.attn.to_q" in shown.stdout

    data = json.loads(run("inspect", str(tmp_path / "a"), "--json", "--layers").stdout)
    assert data[0]["ternary_layers"] == 26
    assert len(data[0]["layers"]) > 26

    made = run("convert", str(tmp_path / "a"), str(tmp_path / "b"), "--packing", "base3", "--json")
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["settings"]["packing"] == "base3"
    wrong = run("convert", str(tmp_path / "a"), str(tmp_path / "c"), "--packing", "bas3")
    assert wrong.exit_code == 2
    assert "did you mean 'base3'?" in wrong.stderr

    flip_last_bit(tmp_path / "b")
    broken = run("inspect", str(tmp_path / "b"))
    assert broken.exit_code == 2
    assert "does not match its checksum" in broken.stderr
    assert run("inspect", str(tmp_path / "b"), "--headers").exit_code == 0
    assert run("inspect").exit_code == 2


def test_environment() -> None:
    facts = json.loads(run("inspect", "--env", "--json").stdout)
    assert {"python", "torch", "diffusers", "tritflow", "cpu cores"} <= set(facts)
    assert all(isinstance(v, str) for v in facts.values())
