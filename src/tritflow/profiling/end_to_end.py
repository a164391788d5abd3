"""Seconds from a prompt to a PNG, split into text encoders, sampler steps, VAE and file, the first time and later.

The first generation of a process pays for what later ones find ready: kernels are compiled, weights are expanded,
graphs are recorded. It is told apart, and so is loading.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tritflow import results
from tritflow.pipelines.generate import generate, save_pictures
from tritflow.pipelines.loading import configure_, generation_defaults, load_pipeline, pick_device, quiet
from tritflow.pipelines.optimize import is_optimized, optimize
from tritflow.pipelines.synthetic_pipeline import RANDOM, random_pipeline
from tritflow.profiling.latency import PROMPT, quantiles, resident_bytes

STAGES = ("text", "transformer", "vae", "png", "rest", "total")
Progress = Callable[[int, int], None]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def stopwatch(pipe: Any, device: torch.device) -> Iterator[dict[str, list[float]]]:
    """Seconds of every call of the text encoders, the transformer and the VAE's decoder, while the block runs."""
    taken: dict[str, list[float]] = {"text": [], "transformer": [], "vae": []}
    restore: list[Callable[[], None]] = []

    def watch(owner: Any, name: str, stage: str) -> None:
        inner, had = getattr(owner, name), name in owner.__dict__

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = _now(device)
            out = inner(*args, **kwargs)
            taken[stage].append(_now(device) - begin)
            return out

        owner.__dict__[name] = timed
        restore.append(lambda: owner.__dict__.update({name: inner}) if had else owner.__dict__.pop(name))

    watch(pipe, "encode_prompt", "text")
    watch(pipe.transformer, "forward", "transformer")
    watch(pipe.vae, "decode", "vae")
    try:
        yield taken
    finally:
        for undo in restore:
            undo()


def _once(pipe: Any, device: torch.device, folder: Path, seed: int, steps: int | None) -> dict[str, Any]:
    """Stages of one picture in seconds, and each step's milliseconds."""
    with stopwatch(pipe, device) as taken:
        begin = _now(device)
        images = generate(pipe, PROMPT, seed, num_inference_steps=steps)
        drawn = _now(device)
        save_pictures(images, folder / "picture.png")
        end = time.perf_counter()
    stages = {stage: sum(values) for stage, values in taken.items()}
    stages["png"], stages["total"] = end - drawn, end - begin
    stages["rest"] = stages["total"] - sum(stages[s] for s in ("text", "transformer", "vae", "png"))
    # The pipeline asks for the prompt's encoding again, and gets back what it brought.
    return {"stages": stages, "steps": [s * 1e3 for s in taken["transformer"]]}


def _random(mode: str | None, backend: str | None) -> Any:
    pipe = random_pipeline()
    if mode is not None or backend is not None:
        configure_(pipe, mode=mode, backend=backend)
    return pipe


def measure(
    model: str | Path | None = "small-student",
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    mode: str | None = None,
    backend: str | None = None,
    optimized: bool = False,
    num_inference_steps: int | None = None,
    rounds: int = 5,
    note: str = "",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Draw pictures one at a time with a model folder's own settings, and time every part.

    Args:
        model: see `pipelines.loading.load_pipeline`; None for FLUX.1-dev's configs with random weights.
        base, device, dtype, mode, backend: see `pipelines.loading.load_pipeline`.
        optimized: whether `tritflow.optimize` is called first.
        num_inference_steps: of the sampler; the model folder's own by default.
        rounds: pictures that count, after the first.
        note: kept in the results.
        progress: called with (pictures done, pictures in all).

    Returns:
        A run for `tritflow.results`, topic `end-to-end`: `load_seconds`, `first` and `later` with seconds of each of
        `STAGES` (`later`: p20, p50, p80), `step_milliseconds`, the first picture's first and later steps, and
        `transformer_bytes` (its weights after drawing, what kernels keep expanded included) and, on CUDA, `peak_bytes`
        of the whole pipeline while drawing.

    Raises:
        ModelError, DeviceError: the model or the device is not there, or the model cannot be optimized.
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError("end-to-end needs at least one round")
    on = pick_device(device)
    # What is random is there before the clock starts: loading then means its way from host memory to the device.
    ready: Any = _random(mode, backend) if model is None else None
    begin = time.perf_counter()
    with quiet():
        # With `optimized` the modulation layers stay in host memory, so the pipeline is moved by `optimize`.
        home = "cpu" if optimized else str(on)
        kind = dtype or ("bfloat16" if on.type != "cpu" else "float32")
        if model is None:
            pipe = ready.to(home)
        else:
            pipe = load_pipeline(model, base=base, device=home, dtype=kind, mode=mode, backend=backend)
        if optimized:
            optimize(pipe, device=on)
    loaded = _now(on) - begin
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    found = []
    with tempfile.TemporaryDirectory(prefix="tritflow-end-to-end-") as folder:
        for turn in range(rounds + 1):
            found.append(_once(pipe, on, Path(folder), turn, num_inference_steps))
            if progress is not None:
                progress(turn + 1, rounds + 1)
    first, later = found[0], found[1:]
    defaults = generation_defaults(pipe)
    return {
        **results.provenance(str(on)),
        "model": RANDOM if model is None else Path(model).name,
        "optimized": is_optimized(pipe),
        "dtype": kind,
        "mode": mode,
        "backend": backend,
        "load_seconds": loaded,
        "first": first["stages"],
        "later": {stage: quantiles([run["stages"][stage] for run in later]) for stage in STAGES},
        "step_milliseconds": quantiles([s for run in later for s in run["steps"]]),
        "first_picture_steps": {"first": first["steps"][0], "later": quantiles(first["steps"][1:] or first["steps"])},
        "transformer_bytes": resident_bytes(pipe.transformer),
        "peak_bytes": torch.cuda.max_memory_allocated(on) if on.type == "cuda" else None,
        "rounds": rounds,
        "threads": torch.get_num_threads(),
        "settings": {
            "height": defaults.height,
            "width": defaults.width,
            "num_inference_steps": num_inference_steps or defaults.num_inference_steps,
            "max_sequence_length": defaults.max_sequence_length,
        },
        "note": note,
    }


def table(run: dict[str, Any]) -> str:
    """The run in plain text."""
    settings = run["settings"]
    head = (
        f"{run['model']} on {run['device']}: {settings['height']}x{settings['width']}, "
        f"{settings['num_inference_steps']} steps{', optimized' if run['optimized'] else ''}; "
        f"loaded in {run['load_seconds']:.2f} s"
    )
    lines = [head, f"{'seconds':12} {'first':>9} {'p20':>9} {'p50':>9} {'p80':>9}"]
    for stage in STAGES:
        later = run["later"][stage]
        lines.append(
            f"{stage:12} {run['first'][stage]:9.3f} {later['p20']:9.3f} {later['p50']:9.3f} {later['p80']:9.3f}"
        )
    steps, first = run["step_milliseconds"], run["first_picture_steps"]
    lines.append(
        f"one step: {steps['p50']:.1f} ms (p20 {steps['p20']:.1f}, p80 {steps['p80']:.1f}); "
        f"the very first {first['first']:.1f} ms, the rest of that picture {first['later']['p50']:.1f} ms"
    )
    return "\n".join(lines)
