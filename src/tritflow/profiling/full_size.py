"""Quantizing and loading FLUX.1-dev at its real size on this GPU: seconds, peak memory and bytes, measured on files.

Random weights of the real config stand in for the checkpoint: the same bytes pass through the same commands, and only
the pictures would be noise. Every stage runs in a process of its own, so that peaks are its own, and its result is on
the disk before the next one starts: a bench that was cut short goes on where it stopped.

``python -m tritflow.profiling.full_size --workdir DIR --out DIR`` is what ``tritflow bench full-size`` runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tritflow import results
from tritflow.formats.architecture import FLUX1_DEV, flux1_shapes
from tritflow.formats.atomic import atomic_file
from tritflow.formats.safetensors_file import layout, raw_bytes, write_header
from tritflow.formats.writer import INDEX, WEIGHTS
from tritflow.profiling.isolate import Task, run_isolated, serve
from tritflow.profiling.room import SLACK, check_room
from tritflow.profiling.storage import peak_memory

MODULE = "tritflow.profiling.full_size"
SHARD_BYTES = 9_900_000_000
"""Of the dense checkpoint: FLUX.1-dev is published in three shards of at most so much."""
STAGES = (
    "write bf16",
    "quantize 2bit",
    "quantize base3",
    "load 2bit, optimized",
    "load 2bit, to the GPU",
    "load 2bit, through host memory",
    "load base3, optimized",
    "load base3, to the GPU",
    "load bf16, to the GPU",
)
BARS = {"quantize 2bit": 90.0, "load 2bit, to the GPU": 10.0, "load 2bit, optimized": 10.0}
"""Seconds at most, at FLUX.1-dev's config on one H200."""


def write_dense(out: Path, config: Mapping[str, Any], device: str, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a dense bf16 transformer folder of random content in shards, a tensor in memory at a time.

    Args:
        out: the folder.
        config: a `FluxTransformer2DModel` config.
        device: where the content is drawn.
        shard_bytes: at most, a shard.

    Returns:
        Bytes written.
    """
    shapes = flux1_shapes(config)
    shards: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = 2 * torch.Size(shape).numel()
        if shards[-1] and size + nbytes > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    out.mkdir(parents=True, exist_ok=True)
    total = len(shards)
    files = {f"{WEIGHTS}-{i:05d}-of-{total:05d}.safetensors": names for i, names in enumerate(shards, 1)}
    generator = torch.Generator(device).manual_seed(0)
    for file_name, names in files.items():
        entries = layout({name: ("BF16", tuple(shapes[name])) for name in names})
        with atomic_file(out / file_name) as file:
            write_header(file, entries, {"format": "pt"})
            for name in entries:
                shape = tuple(shapes[name])
                tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
                tensor.normal_(0, shape[-1] ** -0.5 if len(shape) > 1 else 0.02, generator=generator)
                file.write(raw_bytes(tensor))
    weight_map = {name: file for file, names in files.items() for name in names}
    nbytes = sum(2 * torch.Size(shape).numel() for shape in shapes.values())
    index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
    results.write_atomically(out / INDEX, json.dumps(index, indent=2).encode())
    results.write_atomically(out / "config.json", json.dumps(dict(config), indent=2).encode())
    return _folder_bytes(out)


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def evict(folder: Path) -> bool:
    """Drop a folder's files from the page cache, so that reading them means reading the disk; False where the
    system has no such call."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def _on_gpu(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {}
    torch.cuda.synchronize()
    return {"gpu_peak_bytes": torch.cuda.max_memory_allocated(), "gpu_bytes": torch.cuda.memory_allocated()}


def run_stage(task: Task) -> dict[str, Any]:
    """One stage, in a process of its own."""
    stage, device, root = task["stage"], task["device"], Path(task["workdir"])
    dense = root / "dense"
    if stage == "write bf16":
        with peak_memory() as peak:
            begin = time.perf_counter()
            size = write_dense(dense, task["config"], device, task["shard_bytes"])
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "bytes": size, "peak_rss_bytes": peak()}
    if device != "cpu":
        torch.zeros(1, device=device)  # the context's seconds are those of no stage
    if stage.startswith("quantize "):
        return _quantize(dense, root / stage.removeprefix("quantize "), device)
    kind, _, how = stage.removeprefix("load ").partition(", ")
    return _load(dense if kind == "bf16" else root / kind / "transformer", how, device)


def _quantize(dense: Path, out: Path, device: str) -> dict[str, Any]:
    from tritflow.pipelines.quantize import quantize

    cold = evict(dense)
    shutil.rmtree(out, ignore_errors=True)
    with peak_memory() as peak:
        begin = time.perf_counter()
        report = quantize(dense, out, packing=out.name, device=device)
        seconds = time.perf_counter() - begin
    size = _folder_bytes(report.transformer)
    found = {"seconds": seconds, "bytes": size, "ratio": _folder_bytes(dense) / size, "peak_rss_bytes": peak()}
    return {**found, "linears": report.linears, "files_evicted": cold, **_on_gpu(device)}


def _load(folder: Path, how: str, device: str) -> dict[str, Any]:
    from tritflow.pipelines.loading import import_for, load_transformer

    import_for(folder)  # imports are not loading
    cold = evict(folder)
    before = 0 if device == "cpu" else torch.cuda.memory_allocated()
    straight = device if how in ("to the GPU", "optimized") else None
    with peak_memory() as peak:
        begin = time.perf_counter()
        model = load_transformer(folder, torch.bfloat16, straight, optimized=how == "optimized")
        if straight is None:
            model.to(device)
        memory = _on_gpu(device)
        seconds = time.perf_counter() - begin
    found = {"seconds": seconds, "peak_rss_bytes": peak(), "files_evicted": cold, **memory}
    return {**found, "gpu_bytes_before": before}


def bench(
    workdir: Path,
    *,
    config: Mapping[str, Any] = FLUX1_DEV,
    device: str = "cuda",
    stages: Sequence[str] = STAGES,
    seconds: float = 900.0,
    shard_bytes: int = SHARD_BYTES,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the stages that `workdir` has no result of yet.

    Args:
        workdir: a folder of its own, for 24 GB of dense shards, 6 GB of ternary ones, and `stages.json`.
        config: a `FluxTransformer2DModel` config.
        device: `cuda`, or `cpu` for a small config.
        stages: names of `STAGES`.
        seconds: for everything; the same call goes on later.
        shard_bytes: of the dense checkpoint.
        say: told each result in a line.

    Returns:
        One run for `tritflow.results`, topic `full-size`.

    Raises:
        ValueError: an unknown stage.
        DiskFullError: not enough room, said before anything is written.
    """
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        raise ValueError(f"unknown stage '{unknown[0]}'; choose from: {', '.join(STAGES)}")
    workdir.mkdir(parents=True, exist_ok=True)
    path = workdir / "stages.json"
    done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    done = {stage: result for stage, result in done.items() if "error" not in result}
    if "write bf16" not in done:
        dense = sum(2 * torch.Size(shape).numel() for shape in flux1_shapes(config).values())
        # Each ternary folder lies there twice while its parts become shards.
        check_room(workdir, dense + dense // 2 + SLACK, "the files")
    deadline = time.monotonic() + seconds

    def note(task: Task, result: dict[str, Any]) -> None:
        done[task["stage"]] = result
        results.write_atomically(path, json.dumps(done, indent=1).encode())
        say(line(task["stage"], result))

    for stage in stages:
        if stage not in done:
            task = {"stage": stage, "device": device, "workdir": str(workdir.resolve()), "shard_bytes": shard_bytes}
            task["config"] = dict(config)
            run_isolated(MODULE, [task], silence=seconds, deadline=deadline, on_result=note)
    return {
        **results.provenance(device),
        "model": "FLUX.1-dev's config, random weights" if config == FLUX1_DEV else "another config, random weights",
        "stages": {stage: done[stage] for stage in STAGES if stage in done},
        "bars_seconds": BARS if config == FLUX1_DEV else {},
    }


def line(stage: str, result: Mapping[str, Any]) -> str:
    """A stage's result in one line."""
    if "error" in result:
        return f"{stage:32} {result['error']}"
    text = f"{stage:32} {result['seconds']:7.2f} s  peak {result['peak_rss_bytes'] / 1e9:5.2f} GB of host memory"
    if "gpu_peak_bytes" in result:
        text += f", {result['gpu_peak_bytes'] / 1e9:5.2f} GB of the GPU's"
    if "bytes" in result:
        text += f"; {result['bytes']:,} bytes"
    if "ratio" in result:
        text += f", {result['ratio']:.2f}x less"
    return text


def table(run: Mapping[str, Any]) -> str:
    """The run in plain text."""
    return "\n".join([run["device"], *(line(stage, result) for stage, result in run["stages"].items())])


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("full-size"), help="where the files lie; kept")
    parser.add_argument("--out", type=Path, help="folder for full-size.json")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only this one; may be repeated")
    parser.add_argument("--seconds", type=float, default=900.0, help="for everything; what was found by then is kept")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker, run_stage)
        return
    if not torch.cuda.is_available():
        raise SystemExit("this bench needs a CUDA device, and this machine shows none")
    run = bench(
        options.workdir,
        stages=options.stage or STAGES,
        seconds=options.seconds,
        say=lambda text: print(text, flush=True),
    )
    if options.out is not None:
        results.write_atomically(options.out / "full-size.json", json.dumps(run, indent=1).encode())
    print(table(run))


if __name__ == "__main__":
    main(sys.argv[1:])
