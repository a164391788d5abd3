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
from tritflow.pipelines.flags import flags
from tritflow.pipelines.generate import generate, save_pictures
from tritflow.pipelines.loading import generation_defaults, load_pipeline, pick_device, quiet
from tritflow.pipelines.optimize import is_optimized
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


def measure(
    model: str | Path = "small-student",
    *,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    mode: str | None = None,
    backend: str | None = None,
    optimized: bool = False,
    num_inference_steps: int | None = None,
    rounds: int = 5,
    deadline: float | None = None,
    note: str = "",
    progress: Progress | None = None,
    keep: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Draw pictures one at a time with a model folder's own settings, and time every part.

    Args:
        model: see `pipelines.loading.load_pipeline`.
        base, device, dtype, mode, backend: see `pipelines.loading.load_pipeline`.
        optimized: whether `tritflow.optimize` is called first.
        num_inference_steps: of the sampler; the model folder's own by default.
        rounds: pictures that count, after the first.
        deadline: of `time.monotonic()`, after which no further round begins; one is always drawn.
        note: kept in the results.
        progress: called with (pictures done, pictures in all).
        keep: called with what is known, after loading and after every picture.

    Returns:
        A run for `tritflow.results`, topic `end-to-end`: `load_seconds`, `first` and `later` with seconds of each of
        `STAGES` (`later`: p20, p50, p80), `step_milliseconds`, the first picture's first and later steps, and
        `transformer_bytes` (its weights after drawing, what kernels keep expanded included), on CUDA `peak_bytes` of
        the whole pipeline while drawing, and `flags`, see `pipelines.flags`.

    Raises:
        ModelError, DeviceError: the model or the device is not there, or the model cannot be optimized.
        ValueError: no rounds.
    """
    if rounds < 1:
        raise ValueError("end-to-end needs at least one round")
    on = pick_device(device)
    kind = dtype or ("bfloat16" if on.type != "cpu" else "float32")
    begin = time.perf_counter()
    with quiet():
        pipe = load_pipeline(model, base=base, device=on, dtype=kind, mode=mode, backend=backend, optimized=optimized)
    loaded = _now(on) - begin
    if on.type == "cuda":
        torch.cuda.reset_peak_memory_stats(on)
    defaults = generation_defaults(pipe)
    run: dict[str, Any] = {
        **results.provenance(str(on)),
        "model": Path(model).name,
        "optimized": is_optimized(pipe),
        "dtype": kind,
        "mode": mode,
        "backend": backend,
        "flags": flags(pipe, on),
        "load_seconds": loaded,
        "threads": torch.get_num_threads(),
        "settings": {
            "height": defaults.height,
            "width": defaults.width,
            "num_inference_steps": num_inference_steps or defaults.num_inference_steps,
            "max_sequence_length": defaults.max_sequence_length,
        },
        "note": note,
    }
    found: list[dict[str, Any]] = []
    if keep is not None:
        keep(run)
    with tempfile.TemporaryDirectory(prefix="tritflow-end-to-end-") as folder:
        for turn in range(rounds + 1):
            if deadline is not None and turn > 1 and time.monotonic() > deadline:
                break
            found.append(_once(pipe, on, Path(folder), turn, num_inference_steps))
            run |= _summary(found)
            run["transformer_bytes"] = resident_bytes(pipe.transformer)
            run["peak_bytes"] = torch.cuda.max_memory_allocated(on) if on.type == "cuda" else None
            if keep is not None:
                keep(run)
            if progress is not None:
                progress(turn + 1, rounds + 1)
    return run


def _summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """What the pictures drawn so far tell."""
    first, later = found[0], found[1:]
    told: dict[str, Any] = {
        "first": first["stages"],
        "first_picture_steps": {"first": first["steps"][0], "later": quantiles(first["steps"][1:] or first["steps"])},
        "rounds": len(later),
    }
    if later:
        told["later"] = {stage: quantiles([run["stages"][stage] for run in later]) for stage in STAGES}
        told["step_milliseconds"] = quantiles([s for run in later for s in run["steps"]])
    return told


def table(run: dict[str, Any]) -> str:
    """The run in plain text, as far as it came."""
    lines = []
    if "load_seconds" in run:
        settings = run["settings"]
        lines.append(
            f"{run['model']} on {run['device']}: {settings['height']}x{settings['width']}, "
            f"{settings['num_inference_steps']} steps{', optimized' if run['optimized'] else ''}; "
            f"loaded in {run['load_seconds']:.2f} s"
        )
    if "first" in run:
        lines.append(f"{'seconds':12} {'first':>9} {'p20':>9} {'p50':>9} {'p80':>9}")
        for stage in STAGES:
            later = run.get("later", {}).get(stage, {})
            numbers = [run["first"][stage], *(later.get(p) for p in ("p20", "p50", "p80"))]
            lines.append(f"{stage:12} " + " ".join("        -" if x is None else f"{x:9.3f}" for x in numbers))
        first = run["first_picture_steps"]
        told = f"the very first step {first['first']:.1f} ms, the rest of that picture {first['later']['p50']:.1f} ms"
        if "step_milliseconds" in run:
            steps = run["step_milliseconds"]
            told = f"one step: {steps['p50']:.1f} ms (p20 {steps['p20']:.1f}, p80 {steps['p80']:.1f}); {told}"
        lines.append(told)
    second = run.get("second_process", {})
    if "first" in second:
        lines.append(
            f"a second process, what the first one compiled in its cache: loaded in {second['load_seconds']:.2f} s, "
            f"picture {second['first']['total']:.2f} s, {second['until_first_picture_seconds']:.1f} s from its start"
        )
    lines += [f"{name}: {stage['error']}" for name, stage in run.get("stages", {}).items() if "error" in stage]
    return "\n".join(lines)
