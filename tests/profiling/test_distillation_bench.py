import json

import pytest
import torch
from tiny_config import CONFIG
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.config import DistillationConfig
from tritflow.profiling import distillation
from tritflow.profiling.distillation import measure_steps
from tritflow.results import read

SIZES = {"device": "cpu", "pixels": 64, "text_tokens": 8, "steps": 1}


@pytest.mark.parametrize(("lean", "each"), [(True, 2), (False, 4)])
def test_a_lean_student_takes_two_bytes_a_weight_and_as_many_for_its_momentum(lean, each):
    settings = DistillationConfig(optimizer="muon", lean=lean)
    runs = measure_steps(CONFIG, settings, batches=(1, 2), **SIZES)
    assert [run["batch_size"] for run in runs] == [1, 2]
    for run in runs:
        assert run["fits"]
        assert run["seconds"] > 0
        assert run["peak_bytes"] > 0
        assert run["weights"] > 50_000
        assert run["latent_bytes"] == each * run["weights"]
        assert each * run["weights"] < run["moment_bytes"] < 1.5 * each * run["weights"] + 8 * 40_000


def test_latents_in_memory_are_measured_too(tiny_flux):
    arguments = ["bench", "distillation", "--like", tiny_flux, "--pixels", 64, "--text-tokens", 8, "--steps", 1]
    arguments += ["--batch-size", "1,2", "--latent-store", "ram", "--json"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)
    assert [(r["latent_store"], r["batch_size"], r["fits"]) for r in runs] == [("ram", 1, True), ("ram", 2, True)]
    assert runs[0]["latent_bytes"] == 2 * runs[0]["weights"]


def test_trits_that_stand_still_take_a_byte_and_no_momentum():
    settings = DistillationConfig(optimizer="muon", lean=True, learning_rate=0.0)
    (run,) = measure_steps(CONFIG, settings, batches=(2,), **SIZES)
    assert run["latent_bytes"] == run["weights"]
    assert run["moment_bytes"] < 8 * 40_000


def test_what_does_not_fit_is_told_and_not_fatal(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(distillation, "_timed", full)
    (run,) = measure_steps(CONFIG, batches=(4,), **SIZES)
    assert (run["fits"], run["seconds"], run["peak_bytes"]) == (False, None, None)


def test_the_command_measures_a_recipes_step(tiny_flux, tmp_path):
    arguments = ["bench", "distillation", "--like", tiny_flux, "--pixels", 64, "--text-tokens", 8, "--steps", 1]
    arguments += ["--batch-size", "1,2", "--results", tmp_path, "--json"]
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == 0, result.output
    runs = json.loads(result.stdout)
    assert [r["recipe"] for r in runs] == ["large-distilled"] * 2
    assert runs[0]["settings"] == {"optimizer": "muon", "lean": True, "compile_blocks": False}
    assert len(read(tmp_path / next(tmp_path.iterdir()).name, "distillation-cpu")) == 2


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--batch-size", "1,x"], "whole numbers"),
        (["--recipe", "fast"], "distils nothing"),
        (["--latent-store", "disk"], "latent_store"),
        (["--budget", "23GiB"], "needs a CUDA device"),
        (["--budget", "much"], "much"),
    ],
)
def test_wrong_requests_are_one_line(extra, words):
    result = CliRunner().invoke(app, ["bench", "distillation", "--like", "small", *extra])
    assert result.exit_code != 0
    assert words in f"{result.output} {result.exception}"


def test_a_machine_without_a_compiler_is_one_line(monkeypatch):
    from torch._dynamo.exc import TorchDynamoException

    def fail(*args, **kwargs):
        raise TorchDynamoException("no C compiler\nand much more")

    monkeypatch.setattr(distillation, "measure_steps", fail)
    result = CliRunner().invoke(app, ["bench", "distillation", "--like", "small"])
    assert result.exit_code != 0
    assert "(no C compiler); add --no-compile" in f"{result.output} {result.exception}"
    assert "much more" not in f"{result.output} {result.exception}"
