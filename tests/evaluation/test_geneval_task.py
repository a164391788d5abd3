"""The GenEval suite: its prompts, its folder, scoring with scripted and with real scorers, the official output."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny_scorers
from suite_fakes import GENEVAL_ROWS, GenEvalTask, ScriptedColors, ScriptedDetector, draw_suite, options

from tritflow.calibration.prompt_sources import PromptsError
from tritflow.evaluation.api import EvaluationError, TaskOptions, get_task, limited
from tritflow.evaluation.images import ImageSet, ImageSetError
from tritflow.evaluation.scorers import mask2former
from tritflow.evaluation.scorers.detection import Detection

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")


@needs_files
def test_the_real_prompts() -> None:
    task = get_task("geneval", TaskOptions(prompts=SHARED))
    records = task.prompts()
    assert len(records) == 553
    assert Counter(r.tag for r in records) == {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    assert [r.id for r in records] == [f"{i:05d}" for i in range(553)]
    assert records[0].text == "a photo of a bench"
    # Every class that is asked for is one of the detector's.
    asked = {c["class"] for r in records for k in ("include", "exclude") for c in r.metadata.get(k, [])}
    assert asked <= set(mask2former.CLASSES)
    few = task.prompts(per_tag=2)
    assert len(few) == 12
    assert {r.id for r in few} <= {r.id for r in records}


@needs_files
def test_a_dry_run_touches_every_tag_and_keeps_seeds() -> None:
    records = get_task("geneval", TaskOptions(prompts=SHARED)).prompts()
    few = limited(records, 12)
    assert Counter(r.tag for r in few) == dict.fromkeys(GenEvalTask.tags, 2)
    assert few == [r for r in records if r in few]
    assert limited(records, 9999) == records
    assert len(limited(records, 1)) == 1
    with pytest.raises(EvaluationError, match="--limit 0"):
        limited(records, 0)


def test_prompts_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(PromptsError, match=r"evaluation_metadata.jsonl.*tritflow prompts fetch"):
        get_task("geneval", TaskOptions(prompts=tmp_path)).prompts()
    with pytest.raises(EvaluationError, match="no split 'val'"):
        GenEvalTask().prompts("val")
    with pytest.raises(EvaluationError, match=r"no scorer 'detektor'; did you mean 'detector'"):
        get_task("geneval", TaskOptions(scorers={"detektor": "x"}))
    with pytest.raises(EvaluationError, match="has none to choose"):
        get_task("scenes", TaskOptions(scorers={"detector": "x"}))


def test_the_folder_is_the_official_one(prompts: Path, tmp_path: Path) -> None:
    task = GenEvalTask(options(prompts))
    draw_suite(tmp_path / "out", task)
    folders = sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_dir())
    assert folders == [f"{i:05d}" for i in range(7)]
    for i, row in enumerate(GENEVAL_ROWS):
        place = tmp_path / "out" / f"{i:05d}"
        # The official scorer reads this file as one JSON value and every \d+.png below samples.
        assert json.load((place / "metadata.jsonl").open()) == row
        assert sorted(p.name for p in (place / "samples").iterdir()) == ["0000.png", "0001.png"]
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} == {
        "meta.json",
        "prompts.jsonl",
        "manifest.jsonl",
    }


def everything(_: object, wanted: list[str]) -> list[Detection]:
    """A cow on the right and a bench on the left; two cows are never there."""
    places = {"cow": (100, 0, 140, 40), "bench": (0, 0, 40, 40)}
    return [Detection(name, 0.95, places[name]) for name in wanted]


def test_scoring(prompts: Path, tmp_path: Path) -> None:
    task = GenEvalTask(options(prompts))
    images = draw_suite(tmp_path / "out", task)
    assert images is not None
    detector, colors = ScriptedDetector(everything), ScriptedColors({"cow": "red", "bench": "red"})
    task.load(detector, colors)
    seen = []
    judgements = task.score(images, lambda done, total: seen.append((done, total)))
    assert [(j.prompt_id, j.sample) for j in judgements] == [(e["prompt_id"], e["sample"]) for e in images.entries]
    passed = {j.tag: j.passed for j in judgements}
    assert passed == {
        "single_object": True,
        "two_object": True,
        "counting": False,
        "colors": True,
        "position": True,
        "color_attr": False,
    }
    why = {j.tag: j.reason for j in judgements}
    assert why["counting"] == "found 1 cow of 2"
    assert why["color_attr"] == "bench is red instead of blue"
    assert colors.asked == 2 * (1 + 2)  # nothing is classified that no rule asks for
    assert detector.batches == [3, 3, 3, 3, 2]
    assert seen[-1] == (14, 14)
    assert task.scorers["detector"] == "scripted"


def test_a_class_that_the_detector_does_not_know(prompts: Path, tmp_path: Path) -> None:
    task = GenEvalTask(options(prompts))
    images = draw_suite(tmp_path / "out", task)
    assert images is not None
    detector = ScriptedDetector(everything)
    detector.classes = ("cow",)  # type: ignore[assignment]
    task.load(detector, ScriptedColors({}))
    with pytest.raises(EvaluationError, match="prompt '00000' asks for 'bench', which scripted does not know"):
        task.score(images)


def test_the_real_scorer_classes_score_a_whole_folder(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    monkeypatch.setattr("tritflow.evaluation.tasks.geneval_rules.THRESHOLD", 0.001)
    chosen = {
        "detector": str(tiny_scorers.mask2former(tmp_path / "m")),
        "colors": str(tiny_scorers.clip(tmp_path / "c")),
    }
    results = []
    for batch_size in (1, 5):
        task = GenEvalTask(TaskOptions(prompts=prompts, scorers=chosen, batch_size=batch_size))
        images = draw_suite(tmp_path / "out", task)
        assert images is not None
        results.append(task.score(images))
    assert results[0] == results[1]
    assert len(results[0]) == 14
    assert all(j.passed == (not j.reason) for j in results[0])
    assert task.substitutes["detector"].startswith("mmdet")


def test_damaged_pictures_stop_the_scoring(prompts: Path, tmp_path: Path) -> None:
    task = GenEvalTask(options(prompts))
    draw_suite(tmp_path / "out", task)
    path = tmp_path / "out" / "00003" / "samples" / "0001.png"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + b"zzzz")
    images = ImageSet.open(tmp_path / "out", task)
    task.load(ScriptedDetector(everything), ScriptedColors({"cow": "red", "bench": "red"}))
    with pytest.raises(ImageSetError, match=r"00003/samples/0001.png.*SHA-256"):
        task.score(images)
