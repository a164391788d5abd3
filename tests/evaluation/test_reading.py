"""Pictures for scorers are read ahead by threads, in batches, while the scorer works."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluation_fakes import draw_set

from tritflow.evaluation.images import ImageSet
from tritflow.evaluation.scorers import loading


@pytest.fixture
def images(tmp_path: Path) -> ImageSet:
    found = draw_set(tmp_path / "set", per_tag=4)
    assert found is not None
    return found


def test_reading_goes_on_while_the_scorer_works(images: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a batch is with the scorer, the next ones are read, by other threads, and not more than `AHEAD` of them."""
    monkeypatch.setattr(loading, "WORKERS", 2)
    read: list[str] = []
    readers: set[str] = set()
    real = ImageSet.pixels_of

    def noted(folder: Path, entry: dict[str, Any]) -> Any:
        readers.add(threading.current_thread().name)
        pixels = real(folder, entry)
        read.append(entry["path"])
        return pixels

    monkeypatch.setattr(ImageSet, "pixels_of", staticmethod(noted))
    seen = 0
    for number, (entries, pixels) in enumerate(loading.batches(images, images.entries, 4)):
        seen += len(entries)
        assert [p.shape for p in pixels] == [(16, 16, 3)] * len(entries)
        wanted = min(len(images.entries), seen + 4 * loading.AHEAD)
        until = time.monotonic() + 10
        while len(read) < wanted and time.monotonic() < until:  # the scorer works here
            time.sleep(0.001)
        assert len(read) == wanted, number
    assert seen == len(images.entries) == 24
    assert threading.main_thread().name not in readers


def test_a_scorer_that_stops_leaves_no_reader_behind(images: ImageSet) -> None:
    before = threading.active_count()
    for _, pixels in loading.batches(images, images.entries, 4):
        assert np.stack(pixels).shape == (4, 16, 16, 3)
        break
    assert threading.active_count() <= before


def test_there_are_as_many_readers_as_cores_within_bounds() -> None:
    assert 2 <= loading.WORKERS <= 16
