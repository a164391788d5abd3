"""A whole evaluation with a toy suite: numbers, overlap, resuming, provenance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from evaluation_fakes import SETTINGS, ToyTask, draw
from PIL import Image

from tritflow.evaluation.api import EvaluationError, Judgement, get_task
from tritflow.evaluation.images import ModelId, read_verdicts
from tritflow.evaluation.models import fingerprint
from tritflow.evaluation.run import Contender, Sampling, evaluate
from tritflow.evaluation.summaries import compare, summarise
from tritflow.results import append, canonical


def darker(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    return [Image.fromarray((np.asarray(p) * 0.95).astype(np.uint8)) for p in draw(prompts, seeds)]


TEACHER = Contender(ModelId("teacher", "tttt"), SETTINGS, lambda: draw)
STUDENT = Contender(ModelId("some/student", "ssss"), SETTINGS, lambda: darker)
SAMPLING = Sampling(samples=4, batch_size=8)


def test_a_run_says_everything(tmp_path: Path) -> None:
    class Masked(ToyTask):
        def object_mask(self):  # type: ignore[no-untyped-def]
            return lambda pixels: pixels[..., 0] > 100

    task = Masked()
    records = task.prompts(per_tag=6)
    stages: dict[str, tuple[int, int]] = {}
    run = evaluate(
        task,
        records,
        STUDENT,
        tmp_path,
        teacher=TEACHER,
        sampling=SAMPLING,
        label="distilled",
        stage=lambda name, done, total: stages.__setitem__(name, (done, total)),
    )
    assert run["label"] == "distilled"
    assert run["prompts"]["count"] == 18
    assert run["prompts"]["pictures"] == 72
    assert run["prompts"]["tags"] == {"light": 6, "dark": 6, "odd": 6}
    assert run["prompts"]["overlap"] == {"known": False, "count": 0, "ids": []}
    assert stages["drawing teacher"] == stages["drawing some/student"] == (72, 72)
    assert {"device", "versions", "command", "time"} <= set(run)
    scores, paired = run["scores"], run["paired"]
    # Overall leaves the third tag out, and is the mean of the two tags' means.
    assert scores["overall"]["value"] == pytest.approx(
        (scores["tags"]["light"]["value"] + scores["tags"]["dark"]["value"]) / 2, abs=1e-6
    )
    assert scores["overall"]["n"] == 48
    difference = paired["overall"]["difference"]
    teacher = run["against"]["scores"]["overall"]["value"]
    assert difference["value"] == pytest.approx(scores["overall"]["value"] - teacher, abs=1e-6)
    assert paired["overall"]["kept"]["value"] == pytest.approx(scores["overall"]["value"] / teacher, abs=1e-6)
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert paired["overall"]["mcnemar"]["only_first"] == 0  # darker pictures never pass alone
    assert 20 < run["fidelity"]["psnr"]["value"] < 45
    verdicts = read_verdicts(tmp_path / "student-ssss-w2a16.scores.jsonl")
    assert len(verdicts) == 72
    assert {v.reason for v in verdicts if not v.passed} == {"too dark"}
    append(tmp_path / "results.json", "toy", run)
    assert json.loads((tmp_path / "results.json").read_text())["runs"][0]["id"]


def test_running_again_loads_no_model_and_gives_the_same_scores(tmp_path: Path) -> None:
    task = ToyTask()
    records = task.prompts(per_tag=3)
    first = evaluate(task, records, STUDENT, tmp_path, teacher=TEACHER, sampling=SAMPLING)

    def never():  # type: ignore[no-untyped-def]
        raise AssertionError("loaded")

    cold = [Contender(c.model, c.settings, never) for c in (STUDENT, TEACHER)]
    second = evaluate(task, records, cold[0], tmp_path, teacher=cold[1], sampling=SAMPLING)
    for key in ("scores", "paired", "fidelity", "pictures", "prompts"):
        assert first[key] == second[key]


def test_trained_on_prompts_are_reported_apart(tmp_path: Path) -> None:
    task = ToyTask()
    records = task.prompts(per_tag=4)
    trained = ["A  light picture, number 2.", "something else"]
    run = evaluate(task, records, STUDENT, tmp_path, teacher=TEACHER, sampling=SAMPLING, trained_on=trained)
    assert run["prompts"]["overlap"] == {"known": True, "count": 1, "ids": ["light-2"]}
    assert run["scores_without_overlap"]["tags"]["light"]["n"] == 12
    assert run["scores"]["tags"]["light"]["n"] == 16
    assert run["paired_without_overlap"]["overall"]["difference"]["n"] == 28
    everything = [r.text for r in records]
    run = evaluate(task, records, STUDENT, tmp_path, sampling=SAMPLING, trained_on=everything)
    assert run["scores_without_overlap"] is None


def test_overall_needs_all_its_tags() -> None:
    found = [Judgement(f"light-{i}", "light", 0, i, 1.0) for i in range(5)]
    summary = summarise(ToyTask(), found)
    assert summary["overall"] is None
    assert summary["tags"]["light"]["value"] == 1.0
    assert summary["seed_noise"] is None
    canonical(summary)


def test_graded_suites_are_averaged() -> None:
    class Graded(ToyTask):
        graded = True

    found = [Judgement(f"{t}-{i}", t, 0, i, 0.25 * i) for t in ("light", "dark") for i in range(4)]
    summary = summarise(Graded(), found)
    assert summary["overall"]["value"] == pytest.approx(0.375)
    assert "mcnemar" not in compare(Graded(), found, found)["overall"]


def test_compare_wants_the_same_seeds() -> None:
    a = [Judgement("light-0", "light", 0, 1, 1.0)]
    b = [Judgement("light-0", "light", 0, 2, 1.0)]
    with pytest.raises(EvaluationError, match="same prompts and seeds"):
        compare(ToyTask(), a, b)


def test_unknown_suite_and_tag() -> None:
    with pytest.raises(EvaluationError, match="did you mean 'scenes'"):
        get_task("scene")
    with pytest.raises(EvaluationError, match="no tag 'lihgt'; did you mean 'light'"):
        ToyTask().prompts(tags=["lihgt"])


def test_fingerprints_tell_models_apart(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    for folder in (a, b):
        (folder / "transformer").mkdir(parents=True)
        (folder / "transformer" / "w.safetensors").write_bytes(bytes(1000))
        (folder / "meta.json").write_text(str(folder))
    assert fingerprint([a]) == fingerprint([b])
    assert fingerprint([a]) != fingerprint([a, b])
    # A config.json says where a model was once loaded from: a place on the disk, too.
    for folder, extra in ((a, {"_name_or_path": "/somewhere"}), (b, {})):
        text = json.dumps({"heads": 4, **extra}, indent=2) + "\n"
        (folder / "transformer" / "config.json").write_text(text)
    assert fingerprint([a]) == fingerprint([b])
    (a / "transformer" / "config.json").write_text(json.dumps({"_name_or_path": "/somewhere", "heads": 5}))
    assert fingerprint([a]) != fingerprint([b])
    (b / "transformer" / "config.json").write_text((a / "transformer" / "config.json").read_text())
    (b / "transformer" / "w.safetensors").write_bytes(bytes(999) + b"x")
    assert fingerprint([a]) != fingerprint([b])
    (tmp_path / "c").mkdir()
    with pytest.raises(EvaluationError, match="no safetensors"):
        fingerprint([tmp_path / "c"])


def test_fingerprint_of_a_large_file_sees_a_changed_tensor(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with path.open("wb") as f:
        f.truncate(80 << 20)
    before = fingerprint([tmp_path])
    with path.open("r+b") as f:
        f.seek(40 << 20)
        f.write(b"\1" * (1 << 20))
    assert fingerprint([tmp_path]) != before
