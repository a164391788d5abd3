"""The scenes suite with the real grammar, renderer, detector and rules."""

from __future__ import annotations

from pathlib import Path

import pytest
from evaluation_fakes import MODEL
from PIL import Image

from tritflow.evaluation.api import EvaluationError, PromptRecord, get_task
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import Settings
from tritflow.evaluation.summaries import summarise
from tritflow.evaluation.tasks import scenes
from tritflow.evaluation.tasks.scenes import ScenesTask, to_prompt, to_record
from tritflow.scenes import SceneBatch, evaluation_prompts, render, scene_of

SETTINGS = Settings(128, 128, 1, 0.0)


@pytest.fixture(scope="module")
def truth():  # type: ignore[no-untyped-def]
    """A pipeline that draws what the prompt says."""
    by_text = {p.text: p for p in [*evaluation_prompts(2), *evaluation_prompts(4)]}

    def draw(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        batch = SceneBatch.from_scenes([scene_of(by_text[p], s) for p, s in zip(prompts, seeds, strict=True)])
        pixels = (render(batch, 128).clamp(0, 1) * 255).round().byte()
        return [Image.fromarray(p.permute(1, 2, 0).numpy()) for p in pixels]

    return draw


def test_prompts_keep_their_names_in_every_selection() -> None:
    task = get_task("scenes")
    all_of_them = task.prompts(per_tag=4)
    assert len({r.id for r in all_of_them}) == 32
    assert [r.tag for r in all_of_them] == [t for t in task.tags for _ in range(4)]
    only = task.prompts(per_tag=4, tags=["position"])
    assert only == [r for r in all_of_them if r.tag == "position"]
    assert task.overall_tags == task.tags[:6]


def test_records_round_trip_through_json() -> None:
    import json

    for prompt in evaluation_prompts(3):
        record = PromptRecord(**json.loads(json.dumps(to_record(prompt).to_dict())))
        assert to_prompt(record) == prompt
        assert record.id == to_record(prompt).id


def test_true_renders_pass_and_wrong_ones_say_why(tmp_path: Path, truth) -> None:  # type: ignore[no-untyped-def]
    task = ScenesTask()
    records = task.prompts(per_tag=2)
    options = {"samples": 1, "batch_size": 32}
    right = draw_images(tmp_path / "right", task, records, truth, MODEL, SETTINGS, **options)
    assert right is not None
    judged = task.score(right)
    assert len(judged) == 16
    assert sum(j.passed for j in judged) >= 15
    blank = [Image.new("RGB", (128, 128), "gray")] * 16
    wrong = draw_images(tmp_path / "wrong", task, records, lambda p, s: blank, MODEL, SETTINGS, **options)
    assert wrong is not None
    judged = task.score(wrong)
    assert not any(j.passed for j in judged)
    assert all(j.reason for j in judged)


def test_pictures_with_ghosts_are_counted(tmp_path: Path, truth) -> None:  # type: ignore[no-untyped-def]
    task = ScenesTask()
    records = task.prompts(per_tag=2, tags=["single_object", "colors"])

    def haunted(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
        pictures = truth(prompts, seeds)
        for y in range(0, 128, 16):  # beside the object, wherever it is
            pictures[0].paste(Image.new("RGB", (16, 2), (118, 118, 118)), (0, y))
            pictures[0].paste(Image.new("RGB", (16, 2), (118, 118, 118)), (112, y))
        return pictures

    options = {"samples": 1, "batch_size": 32}
    images = draw_images(tmp_path, task, records, haunted, MODEL, SETTINGS, **options)
    assert images is not None
    ghosts = summarise(task, task.score(images))["ghosts"]
    assert (ghosts["value"], ghosts["n"]) == (0.25, 4)


def test_a_pool_of_processes_judges_alike(tmp_path: Path, truth, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    task = ScenesTask()
    records = task.prompts(per_tag=4, tags=["colors", "counting"])
    images = draw_images(tmp_path, task, records, truth, MODEL, SETTINGS, samples=1, batch_size=8)
    assert images is not None
    alone = task.score(images)
    monkeypatch.setattr(scenes, "POOL_FROM", 1)
    monkeypatch.setattr(scenes, "_CHUNK", 3)
    assert task.score(images) == alone


def test_refusals() -> None:
    task = ScenesTask()
    with pytest.raises(EvaluationError, match="no split 'train'"):
        task.prompts(split="train")
    with pytest.raises(EvaluationError, match="at least 1"):
        task.prompts(per_tag=0)
    with pytest.raises(EvaluationError, match="'x' is not a scene's prompt"):
        to_prompt(PromptRecord("x", "colors", "a"))
