"""Teach a student the teacher's velocity, on stored trajectories or on states made meanwhile. Knows no model family and
no layer type.

The loss is the mean square error of the velocity, which for a flow model is the error of every sampler step. On CUDA
the whole step (forward, backward, clipping, optimiser) is one CUDA graph, because a small student is bound by kernel
launches: four times faster than eager there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.calibration.artifacts import provenance, write_json
from tritflow.calibration.trajectories import VELOCITY, Batch, Trajectories
from tritflow.config import DistillationConfig
from tritflow.distillation.guard import DistillationError, Guard
from tritflow.distillation.losses import Measure, plain
from tritflow.distillation.offload import OffloadedLatents
from tritflow.distillation.online import OnlineStates
from tritflow.distillation.sharded import Ranks
from tritflow.distillation.state import ParameterGroup, TrainingState
from tritflow.distillation.step import Step, autocast, beside

Student = Callable[..., Tensor]
VALIDATION_PAIRS = 512
# Stands for a whole batch: the numbers of its pairs, where all pairs are on the device.
PAIRS = "pairs"


@dataclass(frozen=True)
class DistillationResult:
    """What `distill_` reached.

    Attributes:
        steps: optimiser steps behind the result, earlier runs included.
        loss: training loss of every step.
        validation: step -> velocity MSE on held-out trajectories.
        retreats: each time the run diverged: `at` which step, `to` which it went back, `why`, and whether it was the
            `last`, so that the best checkpoint is the result.
    """

    steps: int
    loss: list[float]
    validation: dict[int, float]
    retreats: list[dict[str, Any]] = field(default_factory=list)


def distill_(
    student: Student,
    groups: Sequence[ParameterGroup],
    trajectories: Trajectories,
    config: DistillationConfig,
    out_dir: Path | str,
    *,
    states: OnlineStates | None = None,
    offload: OffloadedLatents | None = None,
    measure: Measure = plain,
    device: torch.device | str = "cpu",
    identity: dict[str, Any] | None = None,
    cuda_graph: bool = True,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> DistillationResult:
    """Train `groups` in place so that `student(**kwargs)` gives the recorded velocity.

    In a process group, every process calls this with its part of the student (`sharded.shard_`), or with the whole of
    it, and the same arguments; each takes its share of every batch, and a checkpoint is the same whoever goes on from
    it. Online states are each process's own, of its share of the batch.

    Args:
        student: called with a batch's kwargs; returns the velocity [B, tokens, channels].
        groups: what is trained, on `device`, fp32. Everything else must not require gradients.
        trajectories: training and held-out pairs.
        states: train on these instead of the recorded training pairs.
        offload: keeps latent weights in the machine's memory (lean alone).
        measure: the training loss, see `losses`; validation is the plain mean square whatever it is.
        config: steps, rates, batch size, seed.
        out_dir: holds `checkpoint.safetensors` while running and `curve.json` in the end. A checkpoint of the
            same identity is continued; on the CPU the result is then the same to the last bit.
        device: where to train; bf16 autocast on CUDA.
        identity: JSON that fixes the run beside `config` (hashes of trajectories and initial student).
        cuda_graph: capture the step on CUDA (the student must not synchronise with the host).
        on_progress: called as (step, steps, loss) now and then.

    Raises:
        ValueError: a batch cannot be shared out evenly among the processes.
        DistillationError: it diverged before the first checkpoint, or the checkpoint is of another run.
        DiskFullError: no space left for a checkpoint; the same call resumes.
    """
    device = torch.device(device)
    out_dir = Path(out_dir)
    ranks = Ranks.here()
    extra = {} if states is None else states.state
    with closing(TrainingState(groups, config, device, extra, offload)) as state:
        run = {"config": config.to_dict(), "config_hash": config.hash, **(identity or {})}
        saved = state.load(out_dir, run)
        if saved is None and (out_dir / "checkpoint.safetensors").exists():
            raise DistillationError(f"{out_dir} holds a checkpoint of another run; choose another folder or remove it")
        start, validation = (0, {}) if saved is None else (saved.step, saved.validation)
        if not config.lean:
            _settle(trajectories, device)
        if states is not None and not start:
            states.fill()

        def loss_of(inputs: Mapping[str, Tensor]) -> Tensor:
            if states is not None:
                kwargs = states.inputs(inputs)
                taught = beside(device, lambda: states.velocity(kwargs))
                predicted = student(**kwargs)
                velocity = taught()
                states.advance(inputs, velocity, predicted.detach())
                return measure(predicted, velocity, kwargs)
            if PAIRS in inputs:
                inputs = _inputs(trajectories.pairs(inputs[PAIRS], "train", device))
            kwargs = {n: t for n, t in inputs.items() if n != VELOCITY}
            return measure(student(**kwargs), inputs[VELOCITY], kwargs)

        def validate() -> float:
            return ranks.agree(validation_error(student, trajectories, config.batch_size, device))

        step = Step(loss_of, state, config.grad_clip)
        if not start:
            validation[0] = validate()
        run_step: Callable[[Mapping[str, Tensor]], Tensor] = step.eager

        def batch(number: int) -> dict[str, Tensor]:
            if states is not None:
                return states.draws(number)
            rows = ranks.part(trajectories.order(number, config.batch_size, config.seed))
            if trajectories.device == device:
                return {PAIRS: rows}  # gathered by the step itself
            return _inputs(trajectories.pairs(rows, "train", device))

        if cuda_graph and not config.lean and not state.sharded and device.type == "cuda" and start < config.steps:
            run_step = step.capture({name: t.to(device) for name, t in batch(start).items()})
        judged = trajectories.size("holdout") > 0
        guard = Guard(state, out_dir, run, config, judged=judged, saved=saved)
        report_every = max(1, min(20, config.steps // 50))
        done = start
        while done < config.steps:
            state.set_learning_rates(done)
            state.losses[done] = ranks.mean(run_step(batch(done)))
            done += 1
            if done % report_every == 0 or done == config.steps:
                loss = float(state.losses[done - 1])
                if not math.isfinite(loss):
                    done = guard.retreat(done, f"the loss is {loss}", validation)
                    continue
                if on_progress is not None:
                    on_progress(done, config.steps, loss)
            if done == config.steps or (config.checkpoint_every and done % config.checkpoint_every == 0):
                validation[done] = validate()
                if guard.diverged(validation[done]):
                    done = guard.retreat(done, f"the validation error is {validation[done]:.4g}", validation)
                    continue
                guard.save(done, validation)
        made = guard.retreats[-1]["to"] if guard.retreats and guard.retreats[-1]["last"] else config.steps
        result = DistillationResult(made, state.losses[:made].tolist(), validation, guard.retreats)
        if ranks.first:
            write_json(out_dir / "curve.json", _curve(result, run, device))
        return result


@torch.no_grad()
def validation_error(student: Student, trajectories: Trajectories, batch_size: int, device: torch.device) -> float:
    """Velocity MSE over held-out pairs, the same ones every time; NaN if nothing is held out.

    Compiled parts run eagerly: compiling them a second time, without gradients, costs more than is won here.
    """
    total = count = 0.0
    for indices in _validation_pairs(trajectories, batch_size):
        batch = trajectories.pairs(indices, "holdout", device)
        with autocast(device), torch.compiler.set_stance("force_eager"):
            predicted = student(**batch.kwargs)
        total += float((predicted.float() - batch.velocity).double().square().sum())
        count += batch.velocity.numel()
    return total / count if count else math.nan


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {**batch.kwargs, VELOCITY: batch.velocity}


def _validation_pairs(trajectories: Trajectories, batch_size: int) -> Iterator[Tensor]:
    size = trajectories.size("holdout")
    chosen = torch.arange(size)
    if size > VALIDATION_PAIRS:
        chosen = torch.linspace(0, size - 1, VALIDATION_PAIRS).long()
    return iter(chosen.split(batch_size)) if size else iter(())


def _settle(trajectories: Trajectories, device: torch.device) -> None:
    """Keep the pairs on the GPU if they fit beside the student; else they are read from the mapped files."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if trajectories.device is None and trajectories.nbytes < 0.4 * free:
            trajectories.load(device)


def _curve(result: DistillationResult, run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        "kind": "distillation",
        **run,
        **provenance(device),
        "steps": result.steps,
        "validation_mse": {str(k): v for k, v in sorted(result.validation.items())},
        **({"retreats": result.retreats} if result.retreats else {}),
        "loss": [float(f"{x:.6g}") for x in result.loss],
    }
