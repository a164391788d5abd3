"""Block reconstruction with moving trits: a window of blocks learns the teacher's output of that window.

Windows go through the model in order. A window's student sees what the finished student blocks before it really
give; its targets are the teacher's streams, from the teacher's own inputs, so that it also undoes what went wrong
before. Latent weights (straight-through), row and column scales and biases are trained together, with 8-bit
activations in the loop if the student will have them. The loss is the square error of all streams (image, text),
each channel weighed by how much the teacher's velocity depends on it, over the same of what the teacher's window adds.

Knows no model family. Dense blocks are read when they run, and only one window has gradients and optimiser state, so
memory does not grow with the model's depth; the streams of teacher and student lie where the shelf says, within its
budget, and come in batches.
Every finished block is written at once, and a killed run goes on with the same result.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.artifacts import provenance, read_json, write_json
from tritflow.calibration.trajectories import Split, Trajectories
from tritflow.config import DistillationConfig, ReconstructionConfig
from tritflow.distillation.block_streams import (
    Streams,
    call,
    first_inputs,
    loss_weights,
    relative_errors,
    sample_bytes,
    take,
)
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.importance import stream_importance
from tritflow.distillation.overlap import Overlap
from tritflow.distillation.shelf import Room, Shelf, spread
from tritflow.distillation.state import ParameterGroup, TrainingState
from tritflow.distillation.step import Step, training_attention
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.swap import swap_linears_
from tritflow.quantization.convert import twin_of, twin_rounding
from tritflow.quantization.rounding import Rounded
from tritflow.quantization.store import RoundedStore

HOLDOUT_SAMPLES = 32
_TARGET = "target."
CURVE = "curve.json"


class ReconstructionError(ValueError):
    """Training diverged."""


def reconstruct_blocks(
    blocks: Blocks,
    trajectories: Trajectories,
    start: Mapping[str, Rounded],
    store: RoundedStore,
    config: ReconstructionConfig,
    *,
    activation_dtype: str = "int8",
    cuda_graph: bool = True,
    shelf: Shelf | None = None,
    on_samples: Callable[[Room, Tensor, Tensor], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Learn the roundings of all blocks.

    Args:
        blocks: the dense model; it is not changed. Blocks run under bf16 autocast on CUDA.
        trajectories: samples come from the training split, those that judge a window from the holdout.
        start: a rounding of every linear (error-compensated), from which trits and scales move.
        store: receives a group a block; blocks it has already are taken over, so a killed job goes on. Its folder
            also keeps `curve.json`, and the latent weights of overlapping windows while it runs.
        config: steps, window, rates.
        activation_dtype: of 8-bit activations.
        cuda_graph: capture the step on CUDA.
        shelf: where streams are kept, within which budget.
        on_samples: called once with how many samples there was room for, and which pairs of the training and of the
            holdout split they are.
        on_progress: called as (blocks done, of how many).

    Returns:
        What `curve.json` says of each window: its blocks, each stream's relative error on held-out samples before
        and after, the training loss, and whether what was learned was better and kept.

    Raises:
        ReconstructionError: the loss is not finite.
        BudgetError: no sample fits the budget.
        DiskFullError: no space left; the same call resumes.
    """
    work = _Work(blocks, start, store, config, activation_dtype, cuda_graph, shelf or Shelf())
    plan = windows(len(blocks.order), config.window, config.stride)
    chosen = work.choose(trajectories, on_samples)
    done = work.finished(plan)
    curve = work.read_curve(done)
    if done == len(blocks.order):
        return curve
    teacher, held_teacher = work.inputs(trajectories, *chosen)
    student, held = teacher, held_teacher
    for window in plan:
        behind = {window.first: (teacher, held_teacher)}
        for number in range(window.first, window.stop if window.first >= done else window.finish):
            streams, held_streams = behind[number]
            with blocks.dense.loaded(blocks.order[number]) as dense:
                behind[number + 1] = streams.through(dense), held_streams and held_streams.through(dense)
            if number not in (window.first, window.finish):
                del behind[number]
        if window.first >= done:
            students = work.students(window)
            target, held_target = behind[window.stop]
            entry = work.train(students, window, (teacher, student), target, (held, held_target))
            curve = [*curve, entry]
            work.write(students, window, curve)
        teacher, held_teacher = behind[window.finish]
        del behind, streams, held_streams
        for number in range(window.first, window.finish):
            name = blocks.order[number]
            if window.stop < len(blocks.order):  # nobody looks behind the last one
                twin = work.rebuilt(name)
                student, held = student.through(twin), held and held.through(twin)
                del twin
            if on_progress is not None:
                on_progress(number + 1, len(blocks.order))
    return curve


@dataclass(frozen=True)
class Window:
    """Blocks number `first` to `stop` - 1 are trained together; those before `finish` are done then."""

    first: int
    stop: int
    finish: int


def windows(count: int, window: int, stride: int) -> list[Window]:
    """The windows over `count` blocks; the last one finishes all it holds."""
    plan: list[Window] = []
    while not plan or plan[-1].finish < count:
        first = plan[-1].finish if plan else 0
        stop = min(first + window, count)
        plan.append(Window(first, stop, stop if stop == count else first + stride))
    return plan


class _Work:
    """One job: what its windows share."""

    def __init__(
        self,
        blocks: Blocks,
        start: Mapping[str, Rounded],
        store: RoundedStore,
        config: ReconstructionConfig,
        activation_dtype: str,
        cuda_graph: bool,
        shelf: Shelf,
    ) -> None:
        self.blocks, self.start, self.store, self.config, self.shelf = blocks, start, store, config, shelf
        self.device = device = blocks.dense.device
        self.settings: dict[str, Any] = {
            "activation_bits": config.activation_bits,
            "activation_dtype": activation_dtype,
        }
        self.graph = cuda_graph and device.type == "cuda"
        self.overlap = Overlap(store.folder, store.job)
        self.carried: dict[str, nn.Module] = {}
        self.importance: list[dict[str, Tensor]] = []

    def choose(
        self, trajectories: Trajectories, on_samples: Callable[[Room, Tensor, Tensor], None] | None
    ) -> tuple[Tensor, Tensor, torch.device]:
        """Which pairs of the training and of the holdout split are used, and where their streams lie."""
        each, steps = sample_bytes(self.blocks, trajectories), trajectories.steps
        sizes = trajectories.size("train"), trajectories.size("holdout")
        copies = streams_alive(self.config.window)
        room = self.shelf.room(min(self.config.samples, sizes[0]), min(HOLDOUT_SAMPLES, sizes[1]), each, copies)
        train = spread(sizes[0] // steps, steps, room.samples, room.limited)
        held = spread(sizes[1] // steps, steps, room.held, room.limited) if sizes[1] else torch.arange(0)
        if on_samples is not None:
            on_samples(room, train, held)
        return train, held, self.shelf.device(copies * each * (len(train) + len(held)), self.device)

    def inputs(
        self, trajectories: Trajectories, train: Tensor, held: Tensor, store: torch.device
    ) -> tuple[Streams, Streams | None]:
        """What the first block is given: training samples and held-out ones. Also weighs the streams' channels."""
        b, config = self.blocks, self.config
        if config.importance_samples:
            self.importance = stream_importance(
                b, trajectories, samples=config.importance_samples, batch_size=config.importance_batch,
                seed=config.seed,
            )  # fmt: skip

        def first(split: Split, chosen: Tensor) -> Streams:
            size = min(config.batch_size, len(chosen))
            return first_inputs(b, trajectories, chosen, batch_size=size, split=split, shelf=self.shelf, store=store)

        return first("train", train), first("holdout", held) if len(held) else None

    def finished(self, plan: Sequence[Window]) -> int:
        """How many leading blocks are done, by whole windows."""
        order = self.blocks.order
        there = next((i for i, name in enumerate(order) if not self.store.has_group(name)), len(order))
        return max((w.finish for w in plan if w.finish <= there), default=0)

    def read_curve(self, done: int) -> list[dict[str, Any]]:
        path = self.store.folder / CURVE
        if not path.is_file():
            return []
        found = read_json(path)
        return [e for e in found["windows"] if e["first"] < done] if found.get("job") == self.store.job else []

    def students(self, window: Window) -> dict[str, nn.Module]:
        """Student copies of some blocks: those that an earlier window trained already, the others from the start."""
        found: dict[str, nn.Module] = {}
        for name in self.blocks.order[window.first : window.stop]:
            found[name] = self.carried[name] if name in self.carried else self._student(name, self.start)
        if not self.carried:
            self.overlap.load_(found, window.first)
        return found

    def rebuilt(self, name: str) -> nn.Module:
        """A finished block as it is stored, so that a resumed run goes on from the very same function."""
        return self._student(name, self.store)

    def _student(self, name: str, rounded: Mapping[str, Rounded]) -> nn.Module:
        block = self.blocks.dense.copy(name)
        inside = set(self.blocks.inside(name))
        swap_linears_(
            block,
            lambda leaf, _: f"{name}.{leaf}" in inside,
            lambda leaf, linear: twin_of(linear, rounded[f"{name}.{leaf}"], **self.settings),
        )
        return block.requires_grad_(False)

    def train(
        self,
        students: dict[str, nn.Module],
        window: Window,
        inputs: tuple[Streams, Streams],
        targets: Streams,
        held: tuple[Streams | None, Streams | None],
    ) -> dict[str, Any]:
        """Train a window's students in place; returns its entry of the curve.

        Args:
            inputs: of the window's first block, the teacher's and the student's.
            targets: the teacher's streams behind the window.
            held: the student's inputs and the targets of the held-out samples.
        """
        modules, calls = list(students.values()), self.blocks.calls
        names = calls.final if window.stop == len(self.blocks.order) else calls.streams
        importance = self.importance[window.stop - 1] if self.importance else None
        weights = loss_weights(inputs[0], targets, names, importance)
        entry: dict[str, Any] = {"first": window.first, "blocks": list(students)}
        judge: Callable[[], dict[str, float]] | None = None
        held_input, held_target = held
        if held_input is not None and held_target is not None:
            wanted = {n: held_target.streams[n] for n in names}
            judge = functools.partial(relative_errors, modules, held_input, wanted, weights)
            entry["before"] = judge()
        state = TrainingState(_parameter_groups(students, self.config), _training(self.config), self.device)
        before = [p.detach().clone() for p in state.parameters]
        shared = inputs[1].shared

        def loss_of(batch: Mapping[str, Tensor]) -> Tensor:
            streams = dict(batch)
            for module in modules:
                streams |= call(module, calls, streams, shared)
            errors = [(streams[n].float() - batch[_TARGET + n].float()).square() * weights[n] for n in names]
            return torch.stack([error.mean() for error in errors]).sum()

        with training_attention(self.device):
            self._loop(Step(loss_of, state, self.config.grad_clip), inputs[1], targets, names, window.first)
        entry["loss"] = [float(f"{x:.5g}") for x in state.losses[:: max(1, self.config.steps // 50)].tolist()]
        if not math.isfinite(entry["loss"][-1]) or not all(bool(torch.isfinite(p).all()) for p in state.parameters):
            raise ReconstructionError(
                f"the loss of {', '.join(students)} is not finite: lower reconstruction.learning_rate"
            )
        if judge is not None:
            entry["after"] = judge()
            entry["kept"] = sum(entry["after"].values()) < sum(entry["before"].values())
            if not entry["kept"]:
                with torch.no_grad():
                    for parameter, value in zip(state.parameters, before, strict=True):
                        parameter.copy_(value)
        return entry

    def _loop(self, step: Step, inputs: Streams, targets: Streams, names: Sequence[str], first: int) -> None:
        """All steps of a window, without waiting for the GPU once."""
        config, state = self.config, step.state
        home = next(iter(inputs.streams.values())).device
        order = _order(inputs.samples, config, first).to(home)

        def batch(number: int) -> dict[str, Tensor]:
            rows = order[number]
            wanted = {_TARGET + n: take(targets.streams[n], rows, self.device) for n in names}
            return inputs.batch(rows) | wanted

        run_step = step.capture(batch(0)) if self.graph else step.eager
        for number in range(config.steps):
            state.set_learning_rates(number)
            state.losses[number] = run_step(batch(number))

    def write(self, students: dict[str, nn.Module], window: Window, curve: list[dict[str, Any]]) -> None:
        """Write the blocks that are done, and keep the others for the next window."""
        done = self.blocks.order[window.first : window.finish]
        self.carried = {name: block for name, block in students.items() if name not in done}
        if self.carried:
            # Before the blocks: a run killed in between finds what its next window has to go on from.
            self.overlap.save(self.carried, window.finish)
        note = {"kind": "reconstruction", "job": self.store.job, "config": self.config.to_dict()}
        write_json(self.store.folder / CURVE, {**note, **provenance(self.device), "windows": curve})
        for name in done:
            twins = {n: m for n, m in students[name].named_modules() if isinstance(m, FakeTernaryLinear)}
            self.store.write(name, {f"{name}.{n}": twin_rounding(m) for n, m in twins.items()})
        self.overlap.drop_before(window.finish)


def _parameter_groups(window: Mapping[str, nn.Module], config: ReconstructionConfig) -> list[ParameterGroup]:
    latents: dict[str, nn.Parameter] = {}
    scales: dict[str, nn.Parameter] = {}
    biases: dict[str, nn.Parameter] = {}
    for block, module in window.items():
        for leaf, twin in module.named_modules():
            if not isinstance(twin, FakeTernaryLinear):
                continue
            name = f"{block}.{leaf}"
            latents[f"{name}.weight"] = twin.weight
            if config.train_scales:
                scales[f"{name}.log_weight_scale"] = twin.log_weight_scale
                if twin.log_input_scale is not None:
                    scales[f"{name}.log_input_scale"] = twin.log_input_scale
            if config.train_biases and twin.bias is not None:
                biases[f"{name}.bias"] = twin.bias
    groups = [
        ParameterGroup("latent weights", latents, config.learning_rate, matrices=True),
        ParameterGroup("scales", scales, config.scale_learning_rate),
        ParameterGroup("biases", biases, config.scale_learning_rate),
    ]
    for group in groups:
        for parameter in group.parameters.values():
            parameter.requires_grad_(True)
    return groups


def streams_alive(window: int) -> int:
    """Sets of streams alive at once: in front of a window, behind its blocks where wanted, and the student's."""
    return min(5, window + 2)


def _training(config: ReconstructionConfig) -> DistillationConfig:
    """What `TrainingState` wants to know."""
    return DistillationConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        warmup_steps=config.warmup_steps,
        optimizer=config.optimizer,
    )


def _order(samples: int, config: ReconstructionConfig, first: int) -> Tensor:
    """[steps, B] sample numbers, epoch after epoch; the same for a window however the run got there."""
    generator = torch.Generator().manual_seed((config.seed << 20) + first)
    size = min(config.batch_size, samples)
    epochs = -(-config.steps * size // samples)
    drawn = torch.cat([torch.randperm(samples, generator=generator) for _ in range(epochs)])
    return drawn[: config.steps * size].reshape(config.steps, size)
