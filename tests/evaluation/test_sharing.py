"""Scores gathered from several ranks, and waiting that ends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from evaluation_fakes import SETTINGS, ToyTask, draw_set

from tritflow.evaluation import sharing
from tritflow.evaluation.images import ImageSet, ImageSetError
from tritflow.evaluation.projection import project
from tritflow.evaluation.sharing import drop_parts, finished, score_shared, wait_for


@pytest.fixture(autouse=True)
def no_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "WAIT", 0.01)


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    found = draw_set(tmp_path / "pictures")
    assert found is not None
    return found


def scored(images: ImageSet, place: Path, rank: int, world: int = 3, task: ToyTask | None = None, patience: float = 60):  # type: ignore[no-untyped-def]
    return score_shared(task or ToyTask(), images, place, (rank, world), patience, None)


def test_the_parts_make_the_whole(images: ImageSet, tmp_path: Path) -> None:
    place = tmp_path / "one.scores.jsonl"
    results = {}
    threads = [
        threading.Thread(target=lambda r=rank: results.__setitem__(r, scored(images, place, r)))  # type: ignore[misc]
        for rank in (0, 2, 1)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results[0] == ToyTask().score(images)
    assert results[1] is None
    assert results[2] is None
    assert not list(tmp_path.glob("*.jsonl.*"))


def test_rank_0_joins_while_another_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The waiting rank has seen that parts are there, and rank 0 removes them before it reads one."""
    folder = tmp_path / "pictures"
    draw_set(folder, shard=(1, 2))
    assert project(folder, "fake", 18, SETTINGS).present == 8
    read = Path.read_bytes

    def joined_meanwhile(path: Path) -> bytes:
        monkeypatch.setattr(Path, "read_bytes", read)
        assert draw_set(folder, shard=(0, 2)) is not None
        assert not path.exists()
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", joined_meanwhile)
    assert project(folder, "fake", 18, SETTINGS).present == 0
    images = finished(folder, ToyTask())
    assert images is not None
    assert len(images.entries) == 18


def test_a_rank_may_know_scorers_that_another_does_not(images: ImageSet, tmp_path: Path) -> None:
    place = tmp_path / "one.scores.jsonl"
    other, mine = ToyTask(), ToyTask()
    other.scorers = {"mean": "toy", "depth": "deep"}
    other.substitutes = {"depth": "deeper"}
    scored(images, place, 1, 2, other)
    assert scored(images, place, 0, 2, mine) is not None
    assert mine.scorers == {"mean": "toy", "depth": "deep"}
    assert mine.substitutes == {"depth": "deeper"}
    assert ToyTask.scorers == {"mean": "toy"}


def test_ranks_with_other_scorers_are_refused(images: ImageSet, tmp_path: Path) -> None:
    place = tmp_path / "one.scores.jsonl"
    other = ToyTask()
    other.scorers = {"mean": "another"}
    scored(images, place, 1, 2, other)
    with pytest.raises(ImageSetError, match="scored by another, here it is toy"):
        scored(images, place, 0, 2)
    drop_parts(tmp_path, 1)
    assert not list(tmp_path.glob("*.jsonl.*"))


def test_parts_of_other_pictures_do_not_count(images: ImageSet, tmp_path: Path) -> None:
    place = tmp_path / "one.scores.jsonl"
    elsewhere = draw_set(tmp_path / "other", base_seed=3)
    assert elsewhere is not None
    scored(elsewhere, place, 1, 2)
    with pytest.raises(ImageSetError, match=r"parts of the scores: 1 of 2, and the other processes have added none"):
        scored(images, place, 0, 2, patience=0.1)


def test_waiting_goes_on_while_something_moves() -> None:
    seen = []
    steps = iter(range(100))

    def look() -> str | None:
        return "there" if next(steps) == 60 else None

    count = iter(range(100))
    found = wait_for(look, lambda: next(count), 60, "x", 0.2, lambda done, total: seen.append((done, total)))
    assert found == "there"
    assert seen == [(i, 60) for i in range(60)]


def test_a_folder_is_finished_or_not(images: ImageSet, tmp_path: Path) -> None:
    assert finished(tmp_path / "nowhere", ToyTask()) is None
    assert finished(images.folder, ToyTask()) is not None
    (images.folder / images.entries[0]["path"]).unlink()
    assert finished(images.folder, ToyTask()) is None
