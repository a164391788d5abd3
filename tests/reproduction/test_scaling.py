"""Sizes and steps in small: a teacher, two students, killed between, and what the report makes of it."""

import json

import pytest
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.config import CalibrationConfig, DistillationConfig, OnlineConfig, Recipe
from tritflow.report import figures
from tritflow.report.tables import build, load_specs
from tritflow.reproduction import scaling
from tritflow.results import append, read
from tritflow.training import sized
from tritflow.training.models import SmallFluxSize, build_transformer, parameter_count

TINY = SmallFluxSize(hidden=64, heads=2, double=1, single=1)
QUICK = Recipe(
    "quick",
    calibration=CalibrationConfig(num_prompts=4, num_inference_steps=2, batch_size=4, guidance_scales=(3.0,)),
    online=OnlineConfig(pool=2, num_inference_steps=2),
    distillation=DistillationConfig(batch_size=4, optimizer="muon", learning_rate=6e-3, warmup_steps=2),
)
TEACHER = {"examples": 32, "batch": 8, "pixels": 32}


def scale(out, steps, said):
    return list(
        scaling.scale(
            {"tiny": TINY}, steps, out, recipe=QUICK, seconds=2.0, per_tag=1, prompts="scenes:16", teacher=TEACHER,
            say=said.append,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_stages_are_made_once_and_told(tmp_path, monkeypatch):
    said = []

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(scaling, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            scale(tmp_path / "out", [2], said)
    teacher = (tmp_path / "out" / "tiny" / "teacher" / "meta.json").read_bytes()
    runs = scale(tmp_path / "out", [2, 4], said)
    assert (tmp_path / "out" / "tiny" / "teacher" / "meta.json").read_bytes() == teacher
    assert [r["steps"] for r in runs] == [2, 4]
    assert runs[0]["parameters"] == json.loads(teacher)["parameters"] > 100_000
    assert all(r["prompts"]["count"] == 8 and r["psnr"]["value"] > 3 for r in runs)
    assert runs[0]["prompts"]["overlap"]["known"]
    with monkeypatch.context() as patch:
        for name in ("train_sized", "quantize", "evaluate"):
            patch.setattr(scaling, name, killed)
        assert scale(tmp_path / "out", [2, 4], said) == runs
    for run in runs:
        append(tmp_path / "scaling.json", "scaling", run)
    table = build(load_specs()["scaling"], read(tmp_path / "scaling.json"))
    steps = table.header.index("steps")
    assert [row[steps] for row in table.cells] == ["2", "4"]
    assert figures.encode(figures.scaling(read(tmp_path / "scaling.json"))).startswith(b"<?xml")


def test_sizes_hold_what_their_names_say():
    for name, size in sized.SIZES.items():
        count = parameter_count(build_transformer(size)) if name != "40M" else 0
        wanted = float(name.removesuffix("M")) * 1e6
        assert name == "40M" or 0.85 * wanted < count < 1.2 * wanted
        assert size.single == 2 * size.double
        assert size.hidden == 64 * size.heads


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["--sizes", "3M"], "no size '3M'"), (["--steps", "100,many"], "whole numbers"), (["--steps", "0"], "above 0")],
)
def test_wrong_use_is_one_line(tmp_path, arguments, words):
    result = CliRunner().invoke(app, ["bench", "scaling", "--out", str(tmp_path), *arguments])
    assert result.exit_code == 2
    assert words in result.output
