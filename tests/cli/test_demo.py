"""`tritflow demo` on a tiny random FLUX: the same steps as on the built-in one, in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.formats.checkpoint import verify_folder
from tritflow.results import read


def demo(out: Path, *options: object) -> Any:
    return CliRunner().invoke(app, ["demo", "--out", str(out), "--device", "cpu", *map(str, options)])


@pytest.fixture(scope="module")
def done(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("demo")
    options = ("--teacher", tiny_flux, "--student", "none", "--recipe", "absmean", "--per-tag", 1, "--json")
    result = demo(out, *options)
    assert result.exit_code == 0, result.stderr
    return out, json.loads(result.stdout)


def test_it_leaves_a_grid_a_table_and_results(done: tuple[Path, Any]) -> None:
    out, said = done
    with Image.open(out / "grid.png") as grid:
        assert grid.width > 2 * 192
        assert grid.height > 8 * 192  # one prompt a tag
    runs = read(out / "results.json", "scenes")
    assert [r["label"] for r in runs] == ["teacher", "live (absmean)"]
    assert [r["id"] for r in runs] == [r["id"] for r in said["runs"]]
    assert runs[1]["fidelity"]["psnr"] is not None
    table = (out / "table.md").read_text()
    assert "| teacher |" in table
    assert "| live (absmean) |" in table


def test_the_live_model_is_ternary_and_made_by_the_recipe_named(done: tuple[Path, Any], tiny_flux: Path) -> None:
    out, said = done
    assert said["recipe"] == "absmean"
    assert len(verify_folder(out / "live" / "transformer").linears) == 20


def test_it_removes_only_what_a_demo_wrote(tmp_path: Path, tiny_flux: Path) -> None:
    (tmp_path / "live").mkdir()
    (tmp_path / "live" / "mine.txt").write_text("keep me")
    result = demo(tmp_path, "--teacher", tiny_flux, "--student", "none", "--recipe", "absmean")
    assert result.exit_code == 2
    assert "--out" in result.stderr
    assert (tmp_path / "live" / "mine.txt").read_text() == "keep me"


def test_a_misspelt_recipe_suggests_the_nearest(tmp_path: Path, tiny_flux: Path) -> None:
    result = demo(tmp_path, "--teacher", tiny_flux, "--student", "none", "--recipe", "absmaen")
    assert result.exit_code == 2
    assert "did you mean 'absmean'" in result.stderr
