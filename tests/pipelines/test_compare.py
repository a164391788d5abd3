"""Several models on the same noise: likeness in numbers and in one picture."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tritflow.pipelines.compare import compare, draw_grid, psnr
from tritflow.testing import tiny_flux_folder


def test_psnr_is_the_textbook_one() -> None:
    black, grey = Image.new("RGB", (8, 8), (0, 0, 0)), Image.new("RGB", (8, 8), (16, 16, 16))
    assert math.isinf(psnr(black, black))
    assert psnr(grey, black) == pytest.approx(20 * math.log10(255 / 16))
    with pytest.raises(ValueError, match="cannot be compared"):
        psnr(black, Image.new("RGB", (8, 4)))


def test_compare_draws_from_the_same_noise(tiny_flux: Path, tmp_path: Path) -> None:
    other = tiny_flux_folder(tmp_path / "other", seed=9)
    seen: list[str] = []
    result = compare([tiny_flux, other, tiny_flux], ["a red circle", "a star"], 4, device="cpu", on_model=seen.append)
    assert seen == list(result.labels) == ["flux", "other", "flux"]
    assert all(math.isinf(db) for db in result.psnr[0] + result.psnr[2])
    assert all(0 < db < 40 for db in result.psnr[1])
    data = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert data["psnr_db"][0] == [None, None]
    assert data["seeds"] == [4, 4]
    grid = result.grid()
    assert grid.width > 3 * 192
    assert grid.height > 2 * 192
    # The reference picture stands enlarged, pixel for pixel, somewhere in the first column.
    picture = np.asarray(result.images[0][0].resize((192, 192), Image.Resampling.NEAREST))
    page = np.asarray(grid)
    found = [y for y in range(page.shape[0] - 192) if np.array_equal(page[y : y + 192, 12:204], picture)]
    assert len(found) == 1
    across = result.grid(across=True)
    assert (across.width - 12, across.height > grid.height) == (2 * (192 + 12), True)  # two prompts, three models
    page = np.asarray(across)
    second = np.asarray(result.images[0][1].resize((192, 192), Image.Resampling.NEAREST))
    tops = [
        [y for y in range(page.shape[0] - 192) if np.array_equal(page[y : y + 192, x : x + 192], p)]
        for x, p in ((12, picture), (216, second))
    ]
    assert tops[0][0] == tops[1][0]  # the reference's row: both prompts beside each other


def test_names_tell_models_apart(tiny_flux: Path, tmp_path: Path) -> None:
    a, b = (tiny_flux_folder(tmp_path / name / "out", seed=i) for i, name in enumerate("ab"))
    result = compare([a, b], ["a star"], device="cpu", num_inference_steps=1)
    assert result.labels == ("a/out", "b/out")


def test_compare_wants_two_models(tiny_flux: Path) -> None:
    with pytest.raises(ValueError, match="at least two models"):
        compare([tiny_flux], ["a star"])
    with pytest.raises(ValueError, match="2 models need as many labels"):
        compare([tiny_flux, tiny_flux], ["a star"], labels=["one"])


def test_grid_survives_long_captions_and_large_pictures() -> None:
    image = Image.new("RGB", (400, 200), (200, 0, 0))
    grid = draw_grid(["x" * 500, ""], ["a\nb " * 200], [[image], [image]], [["note"], [""]])
    assert grid.size[0] == 12 + 2 * 412
