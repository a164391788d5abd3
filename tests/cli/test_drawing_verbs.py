"""`tritflow generate` and `tritflow compare` from the command line to the files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.testing import tiny_flux_folder


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def test_generate_writes_pictures_and_says_where(tiny_flux: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures" / "a.png"
    done = invoke("generate", "a star", "a ring", "-n", 2, "-m", tiny_flux, "-o", out, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert paths == [out.with_name(f"a-{i}.png") for i in range(4)]
    with Image.open(paths[3]) as picture:
        assert picture.size == (32, 32)
        assert (picture.info["prompt"], picture.info["seed"]) == ("a ring", "1")


def test_generate_json_is_json_alone(tiny_flux: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tritflow.cli.main", "generate", "", "-m", str(tiny_flux), "--json"]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "a.png"), "--device", "cpu"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["pictures"] == [{"path": str(tmp_path / "a.png"), "prompt": "", "seed": 0}]
    assert done.stderr == "note: the prompt is empty: the model draws whatever it likes\n"


def test_generate_is_repeatable(tiny_flux: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        done = invoke("generate", "a star", "-m", tiny_flux, "-o", tmp_path / f"{name}.png", "--device", "cpu")
        assert done.exit_code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--height", "100"], "nearest valid: 96 and 112"),
        (["--mode", "w2a9"], "did you mean 'w2a8'"),
        (["--dtype", "int8"], "unknown dtype"),
        (["--out", "a.jpg"], "PNG"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tiny_flux: Path, options: list[str], said: str) -> None:
    done = invoke("generate", "a star", "-m", tiny_flux, "--device", "cpu", *options)
    assert done.exit_code == 2
    assert said in done.stderr


def test_no_gpu_is_exit_code_3(tiny_flux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = invoke("generate", "a star", "-m", tiny_flux, "--device", "cuda")
    assert done.exit_code == 3
    assert "--device cpu" in done.stderr


def test_compare_takes_models_in_a_row(tiny_flux: Path, tmp_path: Path) -> None:
    other = tiny_flux_folder(tmp_path / "other", seed=2)
    grid = tmp_path / "grid.png"
    done = invoke(
        "compare",
        "a star",
        "--out",
        grid,
        "--device",
        "cpu",
        "--json",
        "--models",
        tiny_flux,
        other,
        tiny_flux,
    )
    assert done.exit_code == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["models"] == ["flux", "other", "flux"]
    assert data["psnr_db"][2] == [None]
    assert 0 < data["psnr_db"][1][0] < 40
    with Image.open(grid) as picture:
        assert picture.width > 3 * 192


def test_compare_wants_two_models(tiny_flux: Path) -> None:
    done = invoke("compare", "a star", "--models", tiny_flux)
    assert done.exit_code == 2
    assert "at least two models" in done.stderr


def test_quantizing_by_rounding_alone_says_so(tiny_flux: Path, tmp_path: Path) -> None:
    done = invoke("quantize", tiny_flux, tmp_path / "OUT")
    assert done.exit_code == 0, done.stderr
    assert "rounding alone breaks pictures" in done.stderr
    assert "--recipe balanced" in done.stderr
    done = invoke("quantize", tiny_flux, tmp_path / "OUT", "--json")
    assert "--recipe balanced" in json.loads(done.stdout)["note"]
