"""Which recorded pairs a stage used: written beside the model, since a budget may have left most of them out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from tritflow.calibration.artifacts import write_bytes
from tritflow.calibration.trajectories import Split, Trajectories
from tritflow.distillation.shelf import Room

if TYPE_CHECKING:
    from tritflow.pipelines.quantize_job import Job

RECORDS = "calibration_records.jsonl"


class Records:
    """A line a stage: how many pairs it asked for, how many the budget had room for; then a line a pair.

    Args:
        job: gives prompts and budget.
        trajectories: whose pairs are named.
        path: written whole at each stage.
    """

    def __init__(self, job: Job, trajectories: Trajectories, path: Path) -> None:
        self.job, self.trajectories, self.path = job, trajectories, path
        self._lines: list[str] = []

    def add(self, stage: str, asked: int, room: Room, **chosen: Tensor) -> None:
        """Note the pairs that `stage` uses, split by split."""
        budget = self.job.recipe.streaming.activation_budget
        pairs = {split: len(indices) for split, indices in chosen.items()}
        self._add({"stage": stage, "asked": asked, "pairs": pairs, "limited": room.limited, "budget": budget})
        texts = self._texts()
        for split, indices in chosen.items():
            for trajectory, step, timestep, guidance in self._of(split, indices):
                entry = {"stage": stage, "split": split, "trajectory": trajectory, "step": step, "timestep": timestep}
                self._add({**entry, "guidance": guidance, "prompt": texts[trajectory]})
        write_bytes(self.path, "".join(self._lines).encode())

    def _add(self, entry: dict[str, object]) -> None:
        self._lines.append(json.dumps(entry, ensure_ascii=False) + "\n")

    def _texts(self) -> list[str]:
        calibration = self.job.recipe.calibration
        assert self.job.prompts is not None
        return self.job.prompts.trajectories(calibration.num_prompts, calibration.seed).texts

    def _of(self, split: str, indices: Tensor) -> list[tuple[int, int, float, float | None]]:
        named: Split = "holdout" if split == "holdout" else "train"
        found = []
        for index in indices.split(1):  # one at a time: a pair's latents may be large
            kwargs = self.trajectories.pairs(index, named).kwargs
            trajectory, step = self.trajectories.place(int(index), named)
            guidance = kwargs.get("guidance")
            timestep = round(float(kwargs["timestep"]), 6)
            found.append((trajectory, step, timestep, None if guidance is None else float(guidance)))
        return found
