"""What quantizing costs at a model's real block size: seconds and peak memory a block, and hours projected from them.

No weights of the model are needed: one double and one single block (or more) of its width are written with random
values, and go through the very functions that `tritflow quantize` calls, on random recorded inputs. A block of random
weights takes as long as one of real ones; what comes out says nothing about pictures.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tritflow import results
from tritflow.assets import ASSETS, asset_path
from tritflow.calibration.artifacts import write_json
from tritflow.calibration.trajectories import VELOCITY, Trajectories, TrajectoryWriter
from tritflow.config import ReconstructionConfig
from tritflow.distillation.block_streams import first_inputs, sample_bytes
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.compensation import compensate_blocks, input_statistics
from tritflow.distillation.importance import stream_importance
from tritflow.distillation.reconstruction import reconstruct_blocks
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.locate import resolve
from tritflow.formats.source import Source, open_source
from tritflow.models import FLUX1, family_of
from tritflow.pipelines.dense import streamed_blocks
from tritflow.profiling.projection import DOUBLE, KINDS, SINGLE
from tritflow.profiling.storage import peak_memory
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.quantization.store import RoundedStore

Progress = Callable[[int, int], None]
_HELD = 2
_ALL = 1 << 62


def measure(
    config: Mapping[str, Any] = FLUX1_DEV,
    *,
    model: str = "FLUX.1-dev",
    blocks: tuple[int, int] = (1, 1),
    device: str = "cuda",
    pixels: int = 1024,
    text_tokens: int = 512,
    samples: int = 8,
    batch_size: int = 2,
    steps: int = 64,
    workdir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure every stage on blocks of `config`'s width; one run for `results.append`, topic `quantization-...`.

    Args:
        config: a `FluxTransformer2DModel` config; its widths count, its depth is what is projected to.
        model: its name in tables.
        blocks: double and single blocks that are run; both at least 1.
        pixels: height and width of the pictures (16 pixels a token).
        text_tokens: of each prompt.
        samples: recorded pairs that go through compensation and reconstruction; at least twice `batch_size`.
        batch_size: pairs at once, at least two.
        steps: optimiser steps by which a window is timed.
        workdir: where the random files lie (None: the system's temporary folder).
        progress: called as (stages done, of how many).

    Returns:
        `seconds`: by stage and kind of block (`DOUBLE`, `SINGLE`): `read` (a dense block from disk), `pass` (a sample
        forward), `round` (from the weights alone), `compensate_block` (once) and `compensate_sample`, `train_step` (one
        optimiser step) and `train_sample` (each sample of it), `importance` (a sample). `peak_bytes` by stage, of the
        GPU, or of the process on a CPU. `bytes`: a recorded pair, what the pairs of a
        trajectory share, a sample's streams, a rounded block.
    """
    if min(blocks) < 1 or batch_size < 2 or samples < 2 * batch_size or steps < 2:
        raise ValueError("a measurement needs a block of each kind, two batches of two samples and two steps")
    on = torch.device(device)
    dtype = torch.bfloat16 if on.type == "cuda" else torch.float32
    small = {**config, "num_layers": blocks[0], "num_single_layers": blocks[1]}
    clock = _Clock(on, progress, 8)
    with tempfile.TemporaryDirectory(prefix="tritflow-quantization-", dir=workdir) as folder:
        root = Path(folder)
        source = _random_source(root / "transformer", small)
        linears = list(FLUX1.block_linears(small))
        trajectories, recorded = _random_trajectories(
            root / "trajectories", small, samples + _HELD, pixels, text_tokens, dtype
        )
        streamed = streamed_blocks(source, FLUX1, linears, on, dtype)
        clock.tick()
        seconds: dict[str, dict[str, float]] = {kind: {} for kind in KINDS}
        sizes = {**recorded, "streams": sample_bytes(streamed, trajectories)}
        _passes(streamed, trajectories, batch_size, clock, seconds)
        start = _round(source, streamed, root, clock, seconds)
        sizes |= {f"rounded_{_kind(p.stem)}": p.stat().st_size for p in sorted((root / "start").glob("*.safetensors"))}
        _compensate(source, streamed, trajectories, root, samples, batch_size, clock, seconds)
        kept = streamed_blocks(source, FLUX1, linears, on, dtype, keep_bytes=_ALL)
        _importance(kept, trajectories, samples, batch_size, clock, seconds)
        del kept
        _reconstruct(streamed, trajectories, start, root, samples, batch_size, steps, clock, seconds)
    return {
        **results.provenance(device),
        "model": model,
        "random": True,
        "depth": {DOUBLE: config["num_layers"], SINGLE: config["num_single_layers"]},
        "parameters": {kind: streamed.dense.parameters_of(_first(streamed, kind)) for kind in KINDS},
        "blocks": {DOUBLE: blocks[0], SINGLE: blocks[1]},
        "dtype": str(dtype).removeprefix("torch."),
        "pixels": pixels,
        "text_tokens": text_tokens,
        "batch_size": batch_size,
        "seconds": {kind: {k: float(f"{v:.4g}") for k, v in found.items()} for kind, found in seconds.items()},
        "peak_bytes": clock.peaks,
        "peak_of": "GPU" if on.type == "cuda" else "process",
        "bytes": sizes,
    }


def config_like(model: str | None) -> tuple[Mapping[str, Any], str]:
    """The config whose widths are measured, and the model's name: FLUX.1-dev's, or that of a dense folder or `small`.

    Raises:
        CheckpointError: no dense transformer there.
        ValueError: it is no FLUX.1.
    """
    if model is None:
        return FLUX1_DEV, "FLUX.1-dev"
    source = open_source(resolve(asset_path(model) if model in ASSETS else model).transformer)
    if family_of(source.config) is not FLUX1:
        raise ValueError(f"{model} is no FLUX.1: only its blocks are run one by one")
    return {**FLUX1_DEV, **source.config}, model


class _Clock:
    """Wall time with the GPU waited for, and the peak memory of a stage."""

    def __init__(self, device: torch.device, progress: Progress | None, stages: int) -> None:
        self.device, self.progress, self.stages = device, progress, stages
        self.peaks: dict[str, int] = {}
        self.done = 0

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        with peak_memory() as resident:
            yield
        self.now()
        on_gpu = self.device.type == "cuda"
        self.peaks[name] = torch.cuda.max_memory_allocated(self.device) if on_gpu else resident()
        self.tick()

    def tick(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.stages)

    def blocks(self, order: list[str]) -> tuple[Callable[[int, int], None], Callable[[], dict[str, float]]]:
        """A callback for `on_progress(blocks done, total)`, and the mean seconds between its calls by kind of block."""
        marks = [self.now()]

        def read() -> dict[str, float]:
            spans = [b - a for a, b in itertools.pairwise(marks)]
            by_kind = {kind: [s for s, n in zip(spans, order, strict=True) if _kind(n) == kind] for kind in KINDS}
            return {kind: sum(found) / len(found) for kind, found in by_kind.items()}

        return lambda done, total: marks.append(self.now()), read


def _kind(block: str) -> str:
    return DOUBLE if block.startswith("transformer_blocks.") else SINGLE


def _first(blocks: Blocks, kind: str) -> str:
    return next(name for name in blocks.order if _kind(name) == kind)


def _passes(
    blocks: Blocks, trajectories: Trajectories, batch_size: int, clock: _Clock, seconds: dict[str, dict[str, float]]
) -> None:
    """`read` and `pass`: a dense block from disk, and samples through it; the first round warms up."""
    streams = first_inputs(blocks, trajectories, torch.arange(2 * batch_size), batch_size=batch_size)
    with clock.stage("pass"):
        for _ in range(2):
            for kind in KINDS:
                begin = clock.now()
                with blocks.dense.loaded(_first(blocks, kind)) as block:
                    seconds[kind]["read"] = clock.now() - begin
                    begin = clock.now()
                    for _ in streams.outputs(block):
                        pass
                    seconds[kind]["pass"] = (clock.now() - begin) / streams.samples


def _round(
    source: Source, blocks: Blocks, root: Path, clock: _Clock, seconds: dict[str, dict[str, float]]
) -> Mapping[str, Rounded]:
    store = RoundedStore(root / "start", "bench")
    with clock.stage("round"):
        for kind in KINDS:
            for name in (n for n in blocks.order if _kind(n) == kind):
                begin = clock.now()
                weights = ((n, source.tensor(f"{n}.weight", blocks.dense.device)) for n in blocks.inside(name))
                store.write(name, {n: round_weight(weight) for n, weight in weights})
                seconds[kind]["round"] = clock.now() - begin
    return store


def _compensate(
    source: Source,
    blocks: Blocks,
    trajectories: Trajectories,
    root: Path,
    samples: int,
    batch_size: int,
    clock: _Clock,
    seconds: dict[str, dict[str, float]],
) -> None:
    """A sample is watched in the dense block and passes the rounded one; what is left, a block costs once."""
    each: dict[str, float] = {}
    streams = first_inputs(blocks, trajectories, torch.arange(samples), batch_size=batch_size)
    for kind in KINDS:
        block = _first(blocks, kind)
        with blocks.dense.loaded(block) as module:
            for _ in range(2):  # the first one warms up
                begin = clock.now()
                input_statistics(blocks, block, module, streams)
                watching = (clock.now() - begin) / samples
        each[kind] = watching + seconds[kind]["pass"]
    step, read = clock.blocks(blocks.order)
    with clock.stage("compensate"):
        compensate_blocks(
            blocks, trajectories, RoundedStore(root / "compensated", "bench"),
            weight_of=lambda name: source.tensor(f"{name}.weight", clock.device),
            samples=samples, batch_size=batch_size, on_progress=step,
        )  # fmt: skip
        found = read()
    for kind in KINDS:
        seconds[kind]["compensate_sample"] = each[kind]
        seconds[kind]["compensate_block"] = max(0.0, found[kind] - samples * each[kind])


def _importance(
    blocks: Blocks,
    trajectories: Trajectories,
    samples: int,
    batch_size: int,
    clock: _Clock,
    seconds: dict[str, dict[str, float]],
) -> None:
    """Of blocks that stay on the device, since reading them is counted apart; kinds share it as they do a pass."""

    def run() -> float:
        begin = clock.now()
        stream_importance(blocks, trajectories, samples=samples, batch_size=batch_size)
        return (clock.now() - begin) / samples

    with clock.stage("importance"):
        run()
        taken = run()
    passing = sum(seconds[_kind(name)]["pass"] for name in blocks.order)
    for kind in KINDS:
        seconds[kind]["importance"] = taken / passing * seconds[kind]["pass"]


def _reconstruct(
    blocks: Blocks,
    trajectories: Trajectories,
    start: Mapping[str, Rounded],
    root: Path,
    samples: int,
    batch_size: int,
    steps: int,
    clock: _Clock,
    seconds: dict[str, dict[str, float]],
) -> None:
    """From runs of different numbers of steps and of samples a step: what a step and what a sample of it cost."""

    def run(count: int, batch: int) -> dict[str, float]:
        step, read = clock.blocks(blocks.order)
        config = ReconstructionConfig(
            steps=count, samples=samples, batch_size=batch, importance_samples=0, warmup_steps=1
        )
        reconstruct_blocks(
            blocks, trajectories, start, RoundedStore(root / f"reconstructed-{batch}-{count}", "bench"), config,
            on_progress=step,
        )  # fmt: skip
        return read()

    def steps_of(batch: int) -> dict[str, float]:
        run(1, batch)  # kernels are compiled, workspaces are made
        few, many = run(2, batch), run(2 + steps, batch)
        return {kind: max(0.0, (many[kind] - few[kind]) / steps) for kind in KINDS}

    with clock.stage("reconstruct"):
        one, more = steps_of(1), steps_of(batch_size)
    for kind in KINDS:
        each = max(0.0, (more[kind] - one[kind]) / (batch_size - 1))
        seconds[kind]["train_sample"] = each
        seconds[kind]["train_step"] = max(0.0, one[kind] - each)


def _random_source(folder: Path, config: Mapping[str, Any]) -> Source:
    """A dense bf16 transformer folder of random weights, small enough that blocks neither vanish nor explode."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in flux1_shapes(config).items():
        tensor = torch.empty(shape, dtype=torch.bfloat16)
        if len(shape) == 1:
            tensors[name] = tensor.fill_(1.0 if "norm_" in name and name.endswith("weight") else 0.0)
        else:
            tensors[name] = tensor.normal_(std=shape[1] ** -0.5, generator=generator)
    folder.mkdir()
    write_json(folder / "config.json", dict(config))
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    return open_source(folder)


def _random_trajectories(
    folder: Path, config: Mapping[str, Any], count: int, pixels: int, text_tokens: int, dtype: torch.dtype
) -> tuple[Trajectories, dict[str, int]]:
    """Recorded pairs, a trajectory each, and how many bytes a pair takes and what all pairs of a trajectory share."""
    side = max(1, pixels // 16)
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    writer = TrajectoryWriter(folder, {}, {})
    for number in range(count):
        hidden = normal(1, 1, side * side, config["in_channels"])
        timestep = torch.full((1, 1), (number + 1) / (count + 1)).to(dtype)
        trajectory = {
            "encoder_hidden_states": normal(1, text_tokens, config["joint_attention_dim"]),
            "pooled_projections": normal(1, config["pooled_projection_dim"]),
        }
        if config.get("guidance_embeds"):
            trajectory["guidance"] = torch.full((1,), 3.5)
        pair = {"hidden_states": hidden, "timestep": timestep, VELOCITY: hidden.clone()}
        writer.write(number, pair, trajectory)
    image = torch.zeros(side, side, 3)
    image[..., 1], image[..., 2] = torch.arange(side)[:, None], torch.arange(side)[None]
    shared = {"txt_ids": torch.zeros(text_tokens, 3), "img_ids": image.reshape(-1, 3)}
    writer.finish(count, {name: t.to(dtype) for name, t in shared.items()}, {})
    sizes = {"pair": sum(t.nbytes for t in pair.values()), "trajectory": sum(t.nbytes for t in trajectory.values())}
    return Trajectories(folder, holdout=_HELD / count), sizes
