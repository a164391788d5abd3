"""The T2I-CompBench suite: its prompts, its folders, scoring by category, the official output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_scorers
from suite_fakes import COMPBENCH_LINES, CompBenchTask, ScriptedDetector, draw_suite, options

from tritflow.evaluation.api import EvaluationError, TaskOptions, get_task
from tritflow.evaluation.scorers import dpt_depth, llava_judge
from tritflow.evaluation.scorers.detection import Detection

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")


@needs_files
def test_the_real_prompts_and_24_000_places() -> None:
    task = get_task("t2i-compbench", TaskOptions(prompts=SHARED))
    records = task.prompts()
    assert Counter(r.tag for r in records) == dict.fromkeys(task.tags, 300)
    assert len({r.id for r in records}) == 2400
    paths = {task.picture_path(r, i, s) for i, r in enumerate(records) for s in range(task.default_samples)}
    assert len(paths) == 24_000
    numbers: dict[str, list[int]] = {}
    for p in paths:
        category, samples, name = p.split("/")
        assert samples == "samples"
        # As the scripts take a name apart.
        assert name.count("_") == 1
        numbers.setdefault(category, []).append(int(name.split("_")[1].split(".")[0]))
    assert all(sorted(n) == list(range(3000)) for n in numbers.values())
    assert max(len(p.rpartition("/")[2].encode()) for p in paths) < 255
    assert len(task.prompts("train")) == 5600
    with pytest.raises(EvaluationError, match="has no split 'all'"):
        task.prompts("all")


def test_the_folder_is_the_official_one(prompts: Path, tmp_path: Path) -> None:
    task = CompBenchTask(options(prompts))
    draw_suite(tmp_path / "out", task)
    names = sorted(p.name for p in (tmp_path / "out" / "color" / "samples").iterdir())
    assert names == [
        "a green bench and a red car_000000.png",
        "a green bench and a red car_000001.png",
        "a red bench and a green car_000010.png",
        "a red bench and a green car_000011.png",
    ]
    with pytest.raises(EvaluationError, match="10 pictures a prompt"):
        draw_suite(tmp_path / "more", task, samples=11)


class ScriptedVqa:
    name = "scripted vqa"

    def __init__(self) -> None:
        self.questions: list[str] = []

    def ask(self, pictures: Sequence[Any], phrases: Sequence[Sequence[str]]) -> list[list[float]]:
        self.questions += [p for mine in phrases for p in mine]
        return [[0.9 if "red" in p else 0.5 for p in mine] for mine in phrases]


class ScriptedDepth:
    name = "scripted depth"

    def depth(self, pictures: Sequence[Any], height: int, width: int) -> list[Any]:
        # x runs along the map's first axis in the suite's scripts: what is further left is nearer.
        return [np.repeat(np.linspace(1, 0, width)[:, None], height, 1).astype(np.float32) for _ in pictures]


class ScriptedJudge:
    name = "scripted judge"

    def grade(self, pictures: Sequence[Any], prompts: Sequence[str], category: str) -> list[int]:
        return [3 if category == "complex" else 5 for _ in pictures]


def pets(_: object, wanted: list[str]) -> list[Detection]:
    """On a picture of 16 pixels: overlapping boxes, the cat further left; one cat too few."""
    return [
        Detection(name, 1.0, {"cat": (0, 0, 8, 8), "dog": (2, 0, 10, 8), "cup": (12, 12, 16, 16)}[name])
        for name in dict.fromkeys(wanted)
    ]


def test_scoring_by_category(prompts: Path, tmp_path: Path) -> None:
    task = CompBenchTask(options(prompts))
    images = draw_suite(tmp_path / "out", task)
    assert images is not None
    vqa, detector = ScriptedVqa(), ScriptedDetector(pets)
    task.use(vqa=vqa, detector=detector, depth=ScriptedDepth(), judge=ScriptedJudge())
    seen = []
    judgements = task.score(images, lambda d, n: seen.append((d, n)))
    assert [(j.prompt_id, j.sample, j.seed) for j in judgements] == [
        (e["prompt_id"], e["sample"], e["seed"]) for e in images.entries
    ]
    by_prompt = {j.prompt_id: j.score for j in judgements}
    assert by_prompt["color-val-0000"] == pytest.approx(0.45)
    assert by_prompt["shape-val-0000"] == pytest.approx(0.25)
    assert set(vqa.questions[:2]) == {"a green bench", "a red car"}
    # Overlap of the two pets is .6: the 2D relation keeps .1 / .6 of its half.
    assert by_prompt["spatial-val-0000"] == pytest.approx(0.5 + 0.1 / 0.6 / 2)
    # Ten pixels of 16 apart are 299 in a frame of 479.
    assert by_prompt["spatial-val-0001"] == pytest.approx(0.5 + 150 / (10 * 479 / 16) / 2)
    assert by_prompt["3d_spatial-val-0000"] == 1
    assert by_prompt["numeracy-val-0000"] == pytest.approx(0.75)
    assert by_prompt["non_spatial-val-0000"] == 1
    assert by_prompt["complex-val-0000"] == pytest.approx(0.6)
    assert seen[-1] == (20, 20)
    assert set(task.scorers) == set(task.substitutes) == {"vqa", "parser", "detector", "depth", "judge"}
    assert (task.scorers["parser"], task.substitutes["parser"]) == (
        "tritflow noun phrases",
        "spaCy en_core_web_sm 3.5.0",
    )


def test_the_real_scorer_classes_score_a_whole_folder(
    prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dpt_depth, "SIDE", 64)
    monkeypatch.setattr(llava_judge, "DESCRIPTION_TOKENS", 3)
    chosen = {
        "vqa": str(tiny_scorers.blip(tmp_path / "b")),
        "detector": str(tiny_scorers.owlv2(tmp_path / "o")),
        "depth": str(tiny_scorers.dpt(tmp_path / "d")),
        "judge": str(tiny_scorers.llava(tmp_path / "l")),
    }
    results = []
    for batch_size in (1, 4):
        task = CompBenchTask(TaskOptions(prompts=prompts, scorers=chosen, batch_size=batch_size))
        images = draw_suite(tmp_path / "out", task)
        assert images is not None
        results.append([j.score for j in task.score(images)])
    assert results[0] == pytest.approx(results[1], abs=2e-4)
    assert len(results[0]) == 2 * sum(map(len, COMPBENCH_LINES.values()))
    assert all(0 <= s <= 1 for s in results[0])
    assert len(set(results[0])) > 5
