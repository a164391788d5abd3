"""The detector's own table: true renders pass, a ruinous round trip does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.tasks.detector import read_back
from tritflow.report.tables import build, load_specs
from tritflow.results import append, read

TAGS = ("single_object", "colors")


def test_reading_and_its_table(tmp_path: Path) -> None:
    run = read_back(6, round_trip=lambda x: x.mean(1, keepdim=True).expand(-1, 3, -1, -1), tags=TAGS)
    assert run["tags"]["colors"]["renders"]["value"] == 1.0
    assert run["tags"]["colors"]["vae"]["value"] == 0.0
    assert run["tags"]["colors"]["vae"]["n"] == 6
    assert run["failures"].keys() == {"single_object, vae", "colors, vae"}
    append(tmp_path / "d.json", "detector", run)
    table = build(load_specs()["detector"], read(tmp_path / "d.json"))
    assert [row[0] for row in table.cells] == list(TAGS)
    assert table.cells[0][1].startswith("100.0 %")
    assert "12 prompts x 1 picture" in " ".join(table.notes)


def test_round_trip_must_keep_the_shape() -> None:
    with pytest.raises(EvaluationError, match="round trip made"):
        read_back(2, round_trip=lambda x: torch.nn.functional.avg_pool2d(x, 2), tags=TAGS)
