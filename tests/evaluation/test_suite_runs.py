"""Whole suites with a stand-in pipeline: drawn by several ranks, projected, with two seed sets."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from evaluation_fakes import SETTINGS as TOY_SETTINGS
from evaluation_fakes import ToyTask, folder_bytes
from evaluation_fakes import draw as toy_draw
from suite_fakes import MODEL, SETTINGS, draw_suite
from suite_fakes import draw as suite_draw

import forked
from tritflow.evaluation import sharing
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.drawing import draw_images
from tritflow.evaluation.images import ImageSet, ImageSetError, ModelId, Settings
from tritflow.evaluation.projection import BYTES_PER_PIXEL, Projection, duration, project
from tritflow.evaluation.ranks import device_of_environment, shard_of_environment
from tritflow.evaluation.run import Contender, Plan, Sampling, evaluate, projections
from tritflow.evaluation.workers import workers_of_environment

HERE = str(Path(__file__).parent)


def test_two_models_get_the_same_seeds(tmp_path: Path) -> None:
    task = ToyTask()
    sets = [
        draw_images(tmp_path / name, task, task.prompts(), toy_draw, ModelId(name, name), TOY_SETTINGS, samples=3)
        for name in ("one", "two")
    ]
    assert sets[0] is not None
    assert sets[1] is not None
    assert [e["seed"] for e in sets[0].entries] == [e["seed"] for e in sets[1].entries]


RANK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from evaluation_fakes import MODEL, SETTINGS, ToyTask, draw
from tritflow.evaluation.ranks import shard_of_environment
from tritflow.evaluation.run import Contender, Plan, Sampling, evaluate
import tritflow.evaluation.sharing as sharing
sharing.WAIT = 0.05
task = ToyTask()
run = evaluate(task, task.prompts(per_tag=4), Contender(MODEL, SETTINGS, lambda: draw), sys.argv[2],
    teacher=Contender(type(MODEL)("teacher", "tt"), SETTINGS, lambda: draw),
    sampling=Sampling(2, 0, 4), plan=Plan(shard=shard_of_environment()))
print(bool(run))
"""


def test_three_processes_make_the_folder_of_one(tmp_path: Path) -> None:
    """As torchrun starts them: RANK and WORLD_SIZE alone tell them apart; each draws and scores its share."""
    task = ToyTask()
    teacher = Contender(ModelId("teacher", "tt"), TOY_SETTINGS, lambda: toy_draw)
    student = Contender(ModelId("fake", "aaaa"), TOY_SETTINGS, lambda: toy_draw)
    alone = evaluate(
        task, task.prompts(per_tag=4), student, tmp_path / "one", teacher=teacher, sampling=Sampling(2, 0, 4)
    )
    ranks = forked.run_ranks(["-c", RANK, HERE, tmp_path / "three"], 3, timeout=120)
    assert [r.poll() for r in ranks] == [0, 0, 0], "\n".join(r.stderr[-2000:] for r in ranks)
    said = [r.stdout.strip() for r in ranks]
    assert said == ["True", "False", "False"]
    assert folder_bytes(tmp_path / "three") == folder_bytes(tmp_path / "one")
    assert alone["prompts"]["pictures"] == 24


def test_rank_0_gives_up_on_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WAIT", 0.01)
    task = ToyTask()
    student = Contender(ModelId("fake", "aaaa"), TOY_SETTINGS, lambda: toy_draw)
    with pytest.raises(ImageSetError, match=r"pictures: 12 of 24, and the other processes have added none for 0 s"):
        evaluate(
            task,
            task.prompts(per_tag=4),
            student,
            tmp_path,
            sampling=Sampling(2, 0, 4),
            plan=Plan(shard=(0, 2), patience=0.2),
        )


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "do not go together"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "do not go together"),
        ({"WORLD_SIZE": "2"}, "RANK is not set"),
        ({"RANK": "x"}, "RANK='x' is not a number"),
    ],
)
def test_launchers_that_make_no_sense(variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert shard_of_environment() == (0, 1)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(EvaluationError, match=words):
        shard_of_environment()


def test_each_process_takes_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert device_of_environment(None) is None
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of_environment(None) == device_of_environment("cuda") == "cuda:1"
    assert device_of_environment("cuda:0") == "cuda:0"
    assert device_of_environment("cpu") == "cpu"
    # More processes than GPUs share them.
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert device_of_environment(None) == "cuda:0"


def test_processes_share_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(12)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert (workers_of_environment(), workers_of_environment(most=4)) == (12, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "5")
    assert workers_of_environment() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "40")
    assert workers_of_environment() == 1


def test_projections(tmp_path: Path) -> None:
    fresh = project(tmp_path / "nowhere" / "yet", "flux", 100, SETTINGS)
    assert (fresh.pictures, fresh.present, fresh.seconds) == (100, 0, None)
    assert fresh.bytes_needed == round(100 * 16 * 16 * BYTES_PER_PIXEL)
    assert "time is known after the first batch" in str(fresh)
    images = draw_suite(tmp_path / "out", ToyTask(), samples=4)
    assert images is not None
    for i, e in enumerate(images.entries):  # as if a picture had taken two seconds, with a pause amid them
        at = 1e9 + 2 * i + (5000 if i > 30 else 0)
        os.utime(images.folder / e["path"], (at, at))
    more = project(tmp_path / "out", "flux", 160, SETTINGS)
    assert more.present == 60
    assert more.seconds == pytest.approx(200)
    mean = sum(e["bytes"] for e in images.entries) / 60
    assert more.bytes_needed == pytest.approx(100 * mean, abs=1)
    assert "160 pictures, 60 of them there; to draw 100" in str(more)
    assert "3 min" in str(more)
    assert str(project(tmp_path / "out", "flux", 60, SETTINGS)) == "flux: all 60 pictures are there"
    with pytest.raises(EvaluationError, match=r"100 pictures of flux need about 2.0 TB|need about 2000.0 GB"):
        Projection("flux", 100, 0, 2 * 10**12, 10**9, None).check()


def paced(folder: Path, each: float, **changes: object) -> ImageSet:
    """A folder whose batches of four came `each` seconds a picture apart, each batch's files at once."""
    images = draw_suite(folder, ToyTask(), samples=2, **changes)
    assert images is not None
    for i, e in enumerate(images.entries):
        at = 1e9 + 4 * each * (i // 4) + 0.01 * (i % 4)
        os.utime(images.folder / e["path"], (at, at))
    return images


def test_the_pace_is_of_whole_batches(tmp_path: Path) -> None:
    """Files of a batch come at once: gaps between pictures would tell how fast they are encoded."""
    paced(tmp_path / "out", 3.0)
    assert project(tmp_path / "out", "flux", 130, SETTINGS).seconds == pytest.approx(300, rel=0.02)


def test_the_pace_of_an_earlier_run_is_told_before_the_first_picture(tmp_path: Path) -> None:
    base = tmp_path / "runs" / "geneval-553x4"
    assert project(base / "student", "student", 100, SETTINGS).seconds is None
    slow = paced(tmp_path / "runs" / "dry" / "teacher", 9.0)
    # A dry run in a folder beside this one; then a folder of this very run, which is newer, and of another mode.
    found = project(base / "student", "student", 100, SETTINGS)
    assert found.seconds == pytest.approx(900, rel=0.02)
    assert found.bytes_needed == pytest.approx(100 * sum(e["bytes"] for e in slow.entries) / 30, abs=1)
    assert "100 pictures; to draw 100: about" in str(found)
    assert "15 min (as dry/teacher took)" in str(found)
    other = Settings(16, 16, 2, 3.5, {"mode": "w2a8"})
    images = draw_images(base / "teacher", ToyTask(), ToyTask().prompts(), suite_draw, MODEL, other, batch_size=4)
    assert images is not None
    for i, e in enumerate(images.entries):
        os.utime(images.folder / e["path"], (1e9 + 8 * (i // 4),) * 2)
    assert project(base / "student", "student", 100, SETTINGS).told_by == "dry/teacher"  # equal settings first
    assert project(base / "student", "student", 100, other).seconds == pytest.approx(200, rel=0.02)
    # Nothing is taken from another size, from other steps, from another device, or when it is not asked for.
    for settings in (Settings(32, 16, 2, 3.5), Settings(16, 16, 3, 3.5)):
        assert project(base / "student", "student", 100, settings).seconds is None
    assert project(base / "student", "student", 100, SETTINGS, device="an H200").seconds is None
    assert project(base / "student", "student", 100, SETTINGS, device="cpu").told_by == "dry/teacher"
    assert project(base / "student", "student", 100, SETTINGS, earlier=False).seconds is None
    # Own pictures come first, and a damaged folder beside this one stops nothing.
    paced(base / "student", 1.0)
    assert project(base / "student", "student", 130, SETTINGS).seconds == pytest.approx(100, rel=0.02)
    (slow.folder / "manifest.jsonl").write_text("{}\n")
    assert project(base / "new", "student", 100, SETTINGS).told_by == "student"


@pytest.mark.parametrize(("seconds", "words"), [(12, "12 s"), (600, "10 min"), (11_100, "3 h 5 min")])
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_full_disk_is_said_before_anything_is_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tritflow.evaluation.projection.BYTES_PER_PIXEL", 1e13)
    task = ToyTask()

    def never():  # type: ignore[no-untyped-def]
        raise AssertionError("loaded")

    with pytest.raises(EvaluationError, match="make room or choose another --out"):
        evaluate(task, task.prompts(), Contender(MODEL, TOY_SETTINGS, never), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_seed_sets_tell_what_seeds_alone_change(tmp_path: Path) -> None:
    task = ToyTask()
    records = task.prompts(per_tag=6)
    student = Contender(ModelId("fake", "aaaa"), TOY_SETTINGS, lambda: toy_draw)
    run = evaluate(task, records, student, tmp_path, sampling=Sampling(4), plan=Plan(noise_seed=9))
    sets = run["seed_sets"]
    assert sets["base_seeds"] == [0, 9]
    difference = run["scores"]["overall"]["value"] - sets["scores"]["overall"]["value"]
    assert sets["overall"]["value"] == pytest.approx(difference, abs=1e-6)
    assert sets["overall"]["low"] < sets["overall"]["value"] < sets["overall"]["high"]
    assert set(sets["tags"]) == {"light", "dark", "odd"}
    seeds = [{e["seed"] for e in ImageSet.open(p.parent).entries} for p in sorted(tmp_path.glob("*/meta.json"))]
    assert len(seeds) == 2
    assert not seeds[0] & seeds[1]
    # What the spread inside prompts foretells is of the size of what two seed sets show.
    assert run["scores"]["seed_noise"] > 0
    assert all(t["seed_noise"] > 0 for t in run["scores"]["tags"].values())
    with pytest.raises(EvaluationError, match="--noise-seed 0 is the run's own"):
        evaluate(task, records, student, tmp_path, sampling=Sampling(4), plan=Plan(noise_seed=0))


def test_drawing_alone_and_the_projection_of_it(tmp_path: Path) -> None:
    task = ToyTask()
    student = Contender(ModelId("fake", "aaaa"), TOY_SETTINGS, lambda: toy_draw)
    before = projections(task.prompts(), student, tmp_path, sampling=Sampling(2), plan=Plan(noise_seed=1))
    assert [p.present for p in before] == [0, 0]
    assert evaluate(task, task.prompts(), student, tmp_path, sampling=Sampling(2), plan=Plan(draw_only=True)) == {}
    assert not list(tmp_path.glob("*.scores.jsonl"))
    assert [p.present for p in projections(task.prompts(), student, tmp_path, sampling=Sampling(2))] == [30]
