"""A student's error on its teacher's states and on its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.pipelines.quantize import quantize
from tritflow.profiling.exposure import measure, table
from tritflow.profiling.sensitivity import SensitivityError
from tritflow.results import read

PROMPTS = ["a red cube", "two blue stars", "a ring"]
STEPS = 5


@pytest.fixture(scope="module")
def student(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exposure") / "student"
    quantize(tiny_flux, out)
    return out


@pytest.fixture(scope="module")
def run(tiny_flux: Path, student: Path) -> dict[str, Any]:
    return measure(str(student), str(tiny_flux), prompts=PROMPTS, num_inference_steps=STEPS, device="cpu")


def test_both_begin_at_the_same_noise_and_part(run: dict[str, Any]) -> None:
    there, own = run["states"]["teacher"], run["states"]["student"]
    assert len(run["timesteps"]) == len(there["mean"]) == len(own["median"]) == STEPS
    assert run["timesteps"][0] == 1.0
    assert run["timesteps"] == sorted(run["timesteps"], reverse=True)
    # Nobody has moved at the first step; behind it the states are others, and so are the errors.
    assert own["mean"][0] == there["mean"][0] > 0
    assert own["mean"][1:] != there["mean"][1:]


def test_an_error_is_the_students_velocity_against_the_teachers(
    tiny_flux: Path, student: Path, run: dict[str, Any]
) -> None:
    from tritflow.calibration.prompts import from_texts
    from tritflow.config import CalibrationConfig
    from tritflow.pipelines.loading import load_pipeline
    from tritflow.pipelines.teacher import record_trajectories

    config = CalibrationConfig(
        num_prompts=3, num_inference_steps=STEPS, guidance_scales=(run["guidance_scale"],), timestep_jitter=0.0
    )
    models = [load_pipeline(str(folder), device="cpu") for folder in (tiny_flux, student)]
    trajectories = record_trajectories(models[0], from_texts(PROMPTS), student.parent / "by hand", config)
    batch = trajectories.pairs(torch.arange(3 * STEPS), "all", "cpu")
    with torch.no_grad():
        velocity = models[1].transformer(**batch.kwargs, return_dict=False)[0]
    errors = (velocity - batch.velocity).square().mean((1, 2)).view(3, STEPS)
    assert run["states"]["teacher"]["mean"] == pytest.approx(errors.mean(0).tolist(), rel=1e-3)


def test_a_model_against_itself_has_no_error(tiny_flux: Path) -> None:
    same = measure(str(tiny_flux), str(tiny_flux), prompts=PROMPTS, num_inference_steps=2, device="cpu")
    for whose in ("teacher", "student"):
        assert max(same["states"][whose]["mean"]) < 1e-6  # the teacher's velocity is stored in half precision
    assert "on its own states" in table(same)


def test_a_folder_without_prompts_asks_for_some(tiny_flux: Path, student: Path) -> None:
    with pytest.raises(SensitivityError, match="--prompts"):
        measure(str(student), str(tiny_flux), device="cpu")


def test_the_command_prints_and_keeps_the_run(tiny_flux: Path, student: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(PROMPTS))
    arguments = ["bench", "exposure", "--model", str(student), "--against", str(tiny_flux), "--device", "cpu"]
    arguments += ["--prompts", str(tmp_path / "p.txt"), "--steps", "2", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "ratio" in done.output
    (file,) = tmp_path.glob("exposure-*.json")
    (kept,) = read(file, "exposure")
    assert kept["trajectories"] == 3
