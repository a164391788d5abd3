"""The decoder alone, trained further: latents stay, and a worse one is not kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tritflow.training import decoder, models, vae


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    torch.manual_seed(0)
    save_file(models.build_vae().state_dict(), tmp_path / "vae.safetensors")
    (tmp_path / "vae.json").write_text(json.dumps({"shift": 0.25, "scale": 2.0}))
    return tmp_path


OPTIONS = ["--seconds", "1", "--examples", "32", "--size", "32", "--batch", "4", "--per-tag", "1", "--workers", "1"]


def scores(monkeypatch: pytest.MonkeyPatch, *values: float) -> None:
    """The detector's scores, in turn: the picture size of this test is too small for the real one."""
    left = list(values)
    monkeypatch.setattr(vae, "detector_scores", lambda *a: {"texture": left.pop(0), "psnr": 30.0})


def test_only_the_decoder_moves(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scores(monkeypatch, 0.98, 0.99)
    first = load_file(run / "vae.safetensors")
    decoder.main([str(run), *OPTIONS])
    then = load_file(run / "vae.safetensors")
    moved = {name.split(".")[0] for name in first if not torch.equal(first[name], then[name])}
    assert moved == {"decoder"}
    assert json.loads((run / "vae.json").read_text()) == {"shift": 0.25, "scale": 2.0}
    assert json.loads((run / "decoder.json").read_text())["after"]["texture"] == 0.99


def test_a_worse_decoder_is_not_kept(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores(monkeypatch, 0.98, 0.97)
    before = (run / "vae.safetensors").read_bytes()
    decoder.main([str(run), *OPTIONS])
    assert (run / "vae.safetensors").read_bytes() == before
    assert "stays as it was" in capsys.readouterr().out


def test_a_folder_without_a_vae_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        decoder.main([str(tmp_path)])
    assert "train the VAE first" in capsys.readouterr().err
