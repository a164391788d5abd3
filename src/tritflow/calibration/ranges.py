"""How large a linear's inputs are, channel by channel, over the teacher's own trajectories."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tritflow.calibration.artifacts import write_tensors
from tritflow.calibration.trajectories import Trajectories
from tritflow.calibration.watching import watched


@dataclass(frozen=True)
class InputRange:
    """Of one linear's inputs.

    Attributes:
        amax: largest magnitude of each channel, fp32 [K].
        mean_square: of each channel, fp32 [K].
    """

    amax: Tensor
    mean_square: Tensor


@torch.no_grad()
def input_ranges(
    model: nn.Module,
    run: Callable[..., Any],
    linears: Sequence[str],
    trajectories: Trajectories,
    *,
    samples: int,
    batch_size: int,
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, InputRange]:
    """Run the dense model over recorded inputs and keep two numbers a channel.

    Args:
        model: dense, on `device`; not changed.
        run: called with a batch's kwargs; runs `model`.
        linears: module names.
        trajectories: `samples` pairs are drawn evenly from the training split.
        batch_size: pairs run at once.
        on_progress: called as (pairs done, of how many).

    Raises:
        ValueError: a linear that never ran.
    """
    amax: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def see(name: str, given: Tensor) -> None:
        x = given.reshape(-1, given.shape[-1]).float()
        largest, total = x.abs().amax(dim=0), x.square().sum(dim=0)
        amax[name] = torch.maximum(amax[name], largest) if name in amax else largest
        squares[name] = squares[name] + total if name in squares else total
        counts[name] = counts.get(name, 0) + x.shape[0]

    size = trajectories.size("train")
    chosen = torch.linspace(0, size - 1, min(samples, size)).round().long()
    done = 0
    with watched({name: model.get_submodule(name) for name in linears}, see):
        for indices in chosen.split(batch_size):
            run(**trajectories.pairs(indices, "train", device).kwargs)
            done += len(indices)
            if on_progress is not None:
                on_progress(done, len(chosen))
    return {name: InputRange(amax[name].cpu(), (squares[name] / counts[name]).cpu()) for name in linears}


def write_ranges(path: Path, ranges: dict[str, InputRange], job: str) -> None:
    """One safetensors file, atomically."""
    tensors = {f"{n}/amax": r.amax for n, r in ranges.items()} | {
        f"{n}/mean_square": r.mean_square for n, r in ranges.items()
    }
    write_tensors(path, tensors, {"job": job})


def read_ranges(path: Path, job: str) -> dict[str, InputRange] | None:
    """What `write_ranges` wrote; None if there is nothing whole of this job."""
    try:
        with safe_open(path, framework="pt") as stream:
            if json.loads(stream.metadata()["tritflow"])["job"] != job:
                return None
            names = sorted({key.rpartition("/")[0] for key in stream.keys()})  # noqa: SIM118 (safe_open is no mapping)
            return {n: InputRange(stream.get_tensor(f"{n}/amax"), stream.get_tensor(f"{n}/mean_square")) for n in names}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
