"""A finished evaluation of the toy suite, shared by this room's tests."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "evaluation"))

from evaluation_fakes import SETTINGS, ToyTask, draw

from tritflow.evaluation.images import ModelId
from tritflow.evaluation.run import Contender, Sampling, evaluate
from tritflow.results import append


def _blurred(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    return [
        Image.fromarray((np.asarray(p) * 0.75 + s % 7).astype(np.uint8))
        for p, s in zip(draw(prompts, seeds), seeds, strict=True)
    ]


@pytest.fixture(scope="session")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `tritflow evaluate` leaves it: two picture sets, verdicts, results.json with two runs."""
    folder = tmp_path_factory.mktemp("evaluated")
    task = ToyTask()
    records = task.prompts(per_tag=4)
    teacher = Contender(ModelId("teacher", "tttttttt"), SETTINGS, lambda: draw)
    student = Contender(ModelId("student <b>", "ssssssss"), SETTINGS, lambda: _blurred)
    for label, who, against in (("teacher", teacher, None), ("absmean", student, teacher)):
        run = evaluate(task, records, who, folder, teacher=against, sampling=Sampling(2, 0, 8), label=label)
        append(folder / "results.json", "toy", run)
    return folder
