"""The detector's own table: true renders pass, a ruinous round trip does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.tasks.detector import read_back
from tritflow.report.tables import build, load_specs
from tritflow.results import append, read
from tritflow.scenes import fidelity

TAGS = ("single_object", "colors")


def test_reading_and_its_table(tmp_path: Path) -> None:
    run = read_back(6, round_trip=lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), tags=TAGS)
    assert run["tags"]["colors"]["renders"]["value"] == 1.0
    assert run["tags"]["colors"]["vae"]["value"] == 0.0
    assert run["tags"]["colors"]["vae"]["n"] == 6
    assert run["failures"].keys() == {"single_object, vae", "colors, vae"}
    append(tmp_path / "d.json", "detector", run)
    table = build(load_specs()["detector"], read(tmp_path / "d.json"))
    assert [row[0] for row in table.cells] == list(TAGS)
    assert table.cells[0][1].startswith("100.0 %")
    assert "12 prompts x 1 picture" in " ".join(table.notes)


def test_round_trip_must_keep_the_shape() -> None:
    with pytest.raises(EvaluationError, match="round trip made"):
        read_back(2, round_trip=lambda x: torch.nn.functional.avg_pool2d(x, 2), tags=TAGS)


def test_the_verb_goes_through_the_models_vae_and_stores_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fidelity, "BACKGROUNDS", ("white",))  # the one on which colours are kept worst
    asked = ["bench", "detector", "--per-tag", "1", "--results", str(tmp_path), "--json"]
    done = CliRunner().invoke(app, asked)
    assert done.exit_code == 0, done.stderr
    (file,) = tmp_path.iterdir()
    (stored,) = read(file, "detector")
    said = json.loads(done.stdout)
    assert said["tags"] == stored["tags"]
    assert all(set(kinds) == {"renders", "vae"} for kinds in said["tags"].values())
    worst = [w["psnr"] for w in said["weakest"]["worst"]]
    assert worst == sorted(worst)
    assert 15 < worst[0] < said["weakest"]["median"]
    shown = CliRunner().invoke(app, ["bench", "detector", "--per-tag", "1"])
    assert "single_object" in shown.stdout
    assert f"drawn worst after the VAE: {said['weakest']['worst'][0]['name']}" in shown.stdout


def test_an_unknown_model_is_one_line() -> None:
    done = CliRunner().invoke(app, ["bench", "detector", "--model", "smal"])
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
