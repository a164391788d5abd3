"""What becomes of a run that diverges: back to its best checkpoint with half the rate, and in the end never a broken
student.

Trits that flip together feed on each other: a loss that has fallen for thousands of steps can leave its valley within a
few hundred, and nothing brings it back while the rate stays (docs/LOG.md).
"""

from __future__ import annotations

import math
import os
import shutil
import warnings
from pathlib import Path
from typing import Any

from tritflow.config import DistillationConfig
from tritflow.distillation.sharded import Ranks
from tritflow.distillation.state import CHECKPOINT, Saved, TrainingState

BEST = "best.safetensors"


class DistillationError(ValueError):
    """Training diverged, or a checkpoint belongs to another run."""


class Guard:
    """Watches one run's validation error. Every process calls it alike.

    Args:
        state: what is trained.
        folder: of the checkpoints; the best one is kept beside the last.
        run: see `TrainingState.save`.
        config: `retreats` and `retreat_above`.
        judged: whether there is a validation error; else only what is not finite counts.
        saved: where the run goes on from, if it does.
    """

    def __init__(
        self,
        state: TrainingState,
        folder: Path,
        run: dict[str, Any],
        config: DistillationConfig,
        *,
        judged: bool,
        saved: Saved | None,
    ) -> None:
        self.state, self.folder, self.run, self.config, self.judged = state, folder, run, config, judged
        self.retreats: list[dict[str, Any]] = [] if saved is None else list(saved.retreats)
        self.best: tuple[int, float] | None = None
        note = state.note(folder, run, BEST) if saved is not None else None
        if note is not None and note.step in note.validation:
            self.best = note.step, note.validation[note.step]
        self._slow_down()

    def _slow_down(self) -> None:
        self.state.rate = 0.5 ** len(self.retreats)

    def diverged(self, error: float) -> bool:
        """Whether a validation error is none any more or far above the best one, or a parameter is not finite."""
        if not self.state.finite():
            return True
        if not self.judged:
            return False
        far = self.best is not None and error > self.config.retreat_above * self.best[1]
        return not math.isfinite(error) or far

    def save(self, step: int, validation: dict[int, float]) -> None:
        """Write the checkpoint of a step that did not diverge; keep it as the best if it is."""
        self.state.save(self.folder, self.run, step, validation, self.retreats)
        error = validation[step] if self.judged else 0.0
        if self.best is None or error <= self.best[1]:
            self.best = step, error
            if Ranks.here().first:
                _link(self.folder / CHECKPOINT, self.folder / BEST)
            Ranks.here().wait()

    def retreat(self, step: int, why: str, validation: dict[int, float]) -> int:
        """Go back to the best checkpoint; with half the rate, or for good when that was done often enough. Returns the
        step to go on from. `validation` loses what lies behind the best.

        Raises:
            DistillationError: there is no checkpoint yet to go back to.
        """
        if self.best is None:
            raise DistillationError(f"{why} at step {step}: lower learning_rate, or raise warmup_steps")
        saved = self.state.load(self.folder, self.run, BEST)
        if saved is None:
            raise DistillationError(f"{why} at step {step}, and {self.folder / BEST} is gone: lower learning_rate")
        last = len(self.retreats) >= self.config.retreats
        self.retreats.append({"at": step, "to": saved.step, "why": why, "last": last})
        for later in [s for s in validation if s > saved.step]:
            del validation[later]
        if Ranks.here().first:
            then = "and ends there" if last else f"with {0.5 ** len(self.retreats):g} of the rate"
            warnings.warn(f"{why} at step {step}: distillation goes back to step {saved.step} {then}", stacklevel=3)
        if last:
            self.state.save(self.folder, self.run, self.config.steps, validation, self.retreats)
            return self.config.steps
        self._slow_down()
        return saved.step


def _link(path: Path, to: Path) -> None:
    """A second name for a file that is only ever replaced, never written to; a copy where there are no links."""
    beside = to.with_name(f"{to.name}.new")
    beside.unlink(missing_ok=True)
    try:
        os.link(path, beside)
    except OSError:
        shutil.copyfile(path, beside)
    beside.replace(to)
