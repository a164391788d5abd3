"""Scoring that goes on where it was killed, and ends in what an unbroken pass gives."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from suite_fakes import (
    CompBenchTask,
    GenEvalTask,
    ScriptedColors,
    ScriptedDetector,
    draw_suite,
    options,
)
from test_compbench_task import ScriptedDepth, ScriptedJudge, ScriptedVqa, pets
from test_geneval_task import everything

import forked
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.images import ImageSet, ImageSetError
from tritflow.evaluation.sharing import score_shared

HERE = str(Path(__file__).parent)


class Killed(Exception):
    """Stands in for a kill after so many batches."""


def geneval(prompts: Path, detector: Any = None) -> GenEvalTask:
    task = GenEvalTask(options(prompts))
    task.load(detector or ScriptedDetector(everything), ScriptedColors({"cow": "red", "bench": "red"}))
    return task


def compbench(prompts: Path, detector: Any = None, vqa: Any = None, depth: Any = None) -> CompBenchTask:
    task = CompBenchTask(options(prompts))
    task.use(
        vqa=vqa or ScriptedVqa(),
        detector=detector or ScriptedDetector(pets),
        depth=depth or ScriptedDepth(),
        judge=ScriptedJudge(),
    )
    return task


def dying(script: Any, after: int) -> ScriptedDetector:
    detector = ScriptedDetector(script)
    whole = detector.detect

    def detect(*arguments: Any) -> Any:
        if len(detector.batches) == after:
            raise Killed
        return whole(*arguments)

    detector.detect = detect  # type: ignore[method-assign]
    return detector


def score(task: Any, images: ImageSet, place: Path) -> Any:
    return score_shared(task, images, place, (0, 1), 1.0, None)


@pytest.mark.parametrize("torn", [False, True])
def test_geneval_goes_on_with_the_batch_that_is_missing(prompts: Path, tmp_path: Path, torn: bool) -> None:
    images = draw_suite(tmp_path / "out", geneval(prompts))
    assert images is not None
    unbroken = score(geneval(prompts), images, tmp_path / "a.scores.jsonl")
    place = tmp_path / "b.scores.jsonl"
    with pytest.raises(Killed):
        score(geneval(prompts, dying(everything, 3)), images, place)
    kept = tmp_path / "b.verdicts.jsonl"
    data = kept.read_bytes()
    assert data.count(b'"path"') == 9
    if torn:  # the last verdict was on its way to the disk
        kept.write_bytes(data[:-20])
    rest = ScriptedDetector(everything)
    task = geneval(prompts, rest)
    assert score(task, images, place) == unbroken
    # A batch with any verdict missing is scored again as a whole, so that batches are those of an unbroken pass.
    assert rest.batches == ([3, 3, 2] if torn else [3, 2])
    assert kept.read_bytes() == (tmp_path / "a.verdicts.jsonl").read_bytes()
    again = ScriptedDetector(everything)
    task = geneval(prompts, again)
    assert score(task, images, place) == unbroken
    assert again.batches == []
    assert task.scorers["detector"] == "scripted"


@pytest.mark.parametrize("after", [0, 1, 2])
def test_compbench_loads_only_what_is_still_to_score(prompts: Path, tmp_path: Path, after: int) -> None:
    images = draw_suite(tmp_path / "out", compbench(prompts))
    assert images is not None
    whole = compbench(prompts)
    unbroken = score(whole, images, tmp_path / "a.scores.jsonl")
    place = tmp_path / "b.scores.jsonl"
    with pytest.raises(Killed):
        score(compbench(prompts, dying(pets, after)), images, place)
    vqa = ScriptedVqa()
    task = compbench(prompts, vqa=vqa)
    assert score(task, images, place) == unbroken
    assert vqa.questions == []  # attributes were done
    assert task.scorers == whole.scorers
    assert task.substitutes == whole.substitutes
    assert (tmp_path / "b.verdicts.jsonl").read_bytes() == (tmp_path / "a.verdicts.jsonl").read_bytes()


def test_other_pictures_scorers_or_batches_start_over(prompts: Path, tmp_path: Path) -> None:
    images = draw_suite(tmp_path / "out", geneval(prompts))
    other = draw_suite(tmp_path / "other", geneval(prompts), base_seed=7)
    assert images is not None
    assert other is not None
    place = tmp_path / "a.scores.jsonl"

    def batches(found: ImageSet, **changes: Any) -> list[int]:
        detector = ScriptedDetector(everything)
        detector.name = changes.pop("name", "scripted")
        task = geneval(prompts, detector)
        task.options = type(task.options)(**{**vars(task.options), **changes})
        score(task, found, place)
        return detector.batches

    assert batches(images) == [3, 3, 3, 3, 2]
    assert batches(images) == []
    assert batches(other) == [3, 3, 3, 3, 2]
    assert batches(other, name="another") == [3, 3, 3, 3, 2]
    assert batches(other, name="another", batch_size=7) == [7, 7]


def test_a_scorer_that_changed_below_its_name_is_refused(prompts: Path, tmp_path: Path) -> None:
    """The depth model is known once it is loaded: the ledger then holds it against what it was."""
    images = draw_suite(tmp_path / "out", compbench(prompts))
    assert images is not None
    place = tmp_path / "a.scores.jsonl"
    score(compbench(prompts), images, place)
    kept = tmp_path / "a.verdicts.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    lines[1] = lines[1].replace("scripted depth", "deeper")
    kept.write_text("".join(line for line in lines if "3d_spatial/" not in line))
    with pytest.raises(EvaluationError, match="was begun with deeper as depth, and now it is scripted depth; delete"):
        score(compbench(prompts), images, place)


def test_kept_verdicts_without_a_seed_are_refused_by_name(prompts: Path, tmp_path: Path) -> None:
    images = draw_suite(tmp_path / "out", geneval(prompts))
    assert images is not None
    place = tmp_path / "a.scores.jsonl"
    score(geneval(prompts), images, place)
    kept = tmp_path / "a.verdicts.jsonl"
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    del lines[3]["seed"]
    kept.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ImageSetError, match=r"a.verdicts.jsonl: line 4 has no 'seed'"):
        score(geneval(prompts), images, place)


def test_another_ranks_part_without_a_seed_is_refused_by_name(prompts: Path, tmp_path: Path) -> None:
    images = draw_suite(tmp_path / "out", geneval(prompts))
    assert images is not None
    place = tmp_path / "a.scores.jsonl"
    assert score_shared(geneval(prompts), images, place, (1, 2), 1.0, None) is None
    part = tmp_path / "a.scores.jsonl.1"
    lines = [json.loads(line) for line in part.read_text().splitlines()]
    del lines[1]["seed"]
    part.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ImageSetError, match=r"a.scores.jsonl.1: line 2 has no 'seed'"):
        score_shared(geneval(prompts), images, place, (0, 2), 1.0, None)


def test_three_ranks_leave_the_ledger_of_one(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritflow.evaluation.sharing.WAIT", 0.01)
    images = draw_suite(tmp_path / "out", geneval(prompts))
    assert images is not None
    alone = score(geneval(prompts), images, tmp_path / "a.scores.jsonl")
    place = tmp_path / "b.scores.jsonl"
    for rank in (2, 1):
        assert score_shared(geneval(prompts), images, place, (rank, 3), 1.0, None) is None
    assert (tmp_path / "b.verdicts.2-of-3.jsonl").exists()
    assert score_shared(geneval(prompts), images, place, (0, 3), 1.0, None) == alone
    assert (tmp_path / "b.verdicts.jsonl").read_bytes() == (tmp_path / "a.verdicts.jsonl").read_bytes()
    assert [p.name for p in tmp_path.glob("b.*")] == ["b.verdicts.jsonl"]


SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import pytest
from suite_fakes import ScriptedDetector, small_suites
from test_geneval_task import everything
from test_ledger import geneval, score
from tritflow.evaluation.images import ImageSet

class Slow(ScriptedDetector):
    def detect(self, *arguments):
        time.sleep(0.15)
        return super().detect(*arguments)

place = Path(sys.argv[2])
with pytest.MonkeyPatch.context() as patch:
    task = geneval(small_suites(place / "prompts", patch), Slow(everything))
    score(task, ImageSet.open(place / "out"), place / "b.scores.jsonl")
"""


def test_a_killed_process_leaves_what_it_scored(prompts: Path, tmp_path: Path) -> None:
    images = draw_suite(tmp_path / "out", geneval(prompts))
    assert images is not None
    unbroken = score(geneval(prompts), images, tmp_path / "a.scores.jsonl")
    kept = tmp_path / "b.verdicts.jsonl"
    process = forked.start(["-c", SLOW, HERE, tmp_path])
    deadline = time.monotonic() + 60
    while not (kept.exists() and kept.read_bytes().count(b'"path"') >= 6) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    rest = ScriptedDetector(everything)
    assert score(geneval(prompts, rest), images, tmp_path / "b.scores.jsonl") == unbroken
    assert 0 < sum(rest.batches) <= 8
    assert kept.read_bytes() == (tmp_path / "a.verdicts.jsonl").read_bytes()
