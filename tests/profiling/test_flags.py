"""The path that is timed and the path that is scored are told by one function, and can be compared."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.contenders import contender
from tritflow.evaluation.images import ModelId, Settings
from tritflow.evaluation.run import Contender, Sampling, evaluate
from tritflow.kernels import tuning
from tritflow.pipelines.flags import differences, flags, tuned_hash
from tritflow.pipelines.loading import load_pipeline
from tritflow.pipelines.optimize import optimize
from tritflow.profiling import end_to_end


@pytest.fixture(scope="module")
def folder(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tritflow.pipelines.quantize import quantize

    out = tmp_path_factory.mktemp("flags") / "ternary"
    quantize(tiny_flux, out, recipe="absmean")
    return out


@pytest.mark.parametrize("optimized", [False, True])
def test_a_bench_and_an_evaluation_of_one_path_have_the_same_flags(folder: Path, optimized: bool) -> None:
    timed = end_to_end.measure(folder, device="cpu", mode="w2a8", optimized=optimized, rounds=1)["flags"]
    scored = contender(str(folder), device="cpu", mode="w2a8", optimized=optimized)
    assert scored.flags is not None
    assert differences(timed, scored.flags()) == []
    assert timed["mode"] == "w2a8"
    assert timed["activation_dtype"] == "int8"
    assert timed["optimized"] is optimized
    other = contender(str(folder), device="cpu", mode="w2a16", optimized=not optimized)
    assert other.flags is not None
    told = differences(timed, other.flags())
    assert f"optimized: {optimized} and {not optimized}" in told
    assert "mode: w2a8 and w2a16" in told
    assert scored.folder_name != other.folder_name


def test_every_choice_shows(folder: Path, tiny_flux: Path) -> None:
    pipe = load_pipeline(folder, device="cpu")
    plain = flags(pipe)
    assert plain["attention"] == "diffusers"
    assert plain["mixed"] is False
    assert flags(optimize(pipe))["attention"] == "16bit"
    assert flags(optimize(pipe, attention="int8"))["attention"] == "int8"
    assert flags(optimize(pipe, cuda_graph=False))["cuda_graph"] is False
    next(m for m in pipe.transformer.modules() if hasattr(m, "backend")).backend = "reference"
    assert flags(pipe)["mixed"] is True
    dense = flags(load_pipeline(tiny_flux, device="cpu"))
    assert dense["mode"] is dense["backend"] is None
    with pytest.raises(EvaluationError, match="--optimize is for ternary ones"):
        contender(str(tiny_flux), device="cpu", optimized=True)


def test_tuned_choices_have_a_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setenv("TRITFLOW_CACHE", str(tmp_path))
    shipped = tuned_hash(torch.device("cuda"))
    assert shipped is not None
    file = tuning.cache_folder() / "nvidia-h200.json"
    tuning.write(file, "NVIDIA H200", {}, {"w2a8 int8 1x2x3": tuning.Choice("triton")})
    assert tuned_hash(torch.device("cuda")) not in (None, shipped)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU that nobody tuned")
    assert tuned_hash(torch.device("cuda")) is None
    assert tuned_hash(torch.device("cpu")) is None


def test_an_evaluation_notes_the_path_when_it_draws(tmp_path: Path) -> None:
    import sys

    sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))
    from evaluation_fakes import SETTINGS, ToyTask, draw

    task, settings = ToyTask(), SETTINGS
    assert isinstance(settings, Settings)
    who = Contender(ModelId("student", "ssss"), settings, lambda: draw, flags=lambda: {"mode": "w2a8"})
    records, sampling = task.prompts(per_tag=2), Sampling(samples=1)
    assert evaluate(task, records, who, tmp_path, sampling=sampling)["flags"] == {"mode": "w2a8"}
    # Nothing is drawn again, so what was noted stays.
    changed = dataclasses.replace(who, flags=lambda: {"mode": "w2a16"})
    assert evaluate(task, records, changed, tmp_path, sampling=sampling)["flags"] == {"mode": "w2a8"}
    next((tmp_path / who.folder_name).rglob("*.png")).unlink()
    with pytest.raises(EvaluationError, match=r"drawn another way \(mode: w2a8, now w2a16\)"):
        evaluate(task, records, changed, tmp_path, sampling=sampling)
    silent = dataclasses.replace(who, flags=None)
    assert evaluate(task, records, silent, tmp_path / "other", sampling=sampling)["flags"] is None
