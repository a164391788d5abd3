"""Hours, memory and disk that a recipe takes on a whole model, from what one block of each kind was measured to take.

A sum of measured parts, no measurement itself: time is taken as proportional to samples, steps and blocks; a step of a
batch costs what a step costs and what its samples cost. Text encoders, the VAE and pauses of the disk are left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tritflow.config import Recipe
from tritflow.distillation.reconstruction import HOLDOUT_SAMPLES, streams_alive, windows
from tritflow.pipelines.demands import checkpoint_bytes, needs_teacher, offloaded_bytes, training_bytes

DOUBLE, SINGLE = "double", "single"
KINDS = (DOUBLE, SINGLE)

BF16_PEAK = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "RTX 4090": 165.0}
"""Dense bf16 TFLOP/s with fp32 accumulation, from NVIDIA's data sheets (SXM for the first three)."""


def project(
    run: Mapping[str, Any], recipe: Recipe, prompts: int = 7232, step_seconds: float | None = None
) -> dict[str, Any]:
    """One recipe on the model that `run` (of `quantization.measure`) stands for.

    Args:
        prompts: how many there are where the recipe takes all.
        step_seconds: of a step of its end-to-end training, measured whole; None: from what the blocks took.

    Returns:
        `hours` by stage and in all; `by_peak_hours`: in all, on other cards (`scaled`); `samples` kept after the
        activation budget; `disk_bytes` of trajectories, roundings and checkpoints; `distillation_bytes`: what
        end-to-end training needs on the GPU before any activation (0: none), `offloaded_bytes` in the machine's memory;
        `step_seconds` as given.
    """
    kinds = [DOUBLE] * run["depth"][DOUBLE] + [SINGLE] * run["depth"][SINGLE]
    s, c, r, d = run["seconds"], recipe.calibration, recipe.reconstruction, recipe.distillation
    all_read, all_pass = (sum(s[kind][part] for kind in kinds) for part in ("read", "pass"))
    all_train = sum(s[kind]["train_step"] + d.batch_size * s[kind]["train_sample"] for kind in kinds)
    weights = sum(run["parameters"][kind] for kind in kinds)
    kept = min(1.0, recipe.streaming.cache_bytes / (2 * weights))  # of the dense blocks, in bf16

    def reading(times: float) -> float:
        return all_read * (kept + times * (1 - kept)) if times else 0.0

    seconds: dict[str, float] = {}
    runs_model = needs_teacher(recipe)
    count = min(c.num_prompts or prompts, prompts) if runs_model else 0
    pairs = count * c.num_inference_steps
    if pairs:
        calls = -(-count // c.batch_size) * c.num_inference_steps
        seconds["record"] = pairs * all_pass + reading(calls)
    samples: dict[str, int] = {}
    if recipe.smoothing is not None:
        asked = min(recipe.compensation_samples, pairs)
        seconds["range"] = asked * all_pass + reading(-(-asked // c.batch_size))
    if recipe.compensation:
        samples["compensate"] = min(recipe.compensation_samples, pairs, _fit(run, recipe, 1))
        once = sum(s[kind]["compensate_block"] for kind in kinds)
        seconds["compensate"] = once + samples["compensate"] * sum(s[kind]["compensate_sample"] for kind in kinds)
    if r.steps:
        fit = _fit(run, recipe, streams_alive(r.window)) - HOLDOUT_SAMPLES
        samples["reconstruct"] = min(r.samples, pairs, max(1, fit))
        weighing = min(r.importance_samples, pairs)
        plan = windows(len(kinds), r.window, r.stride)
        inside = [kinds[i] for w in plan for i in range(w.first, w.stop)]  # twice where windows overlap
        each = min(r.batch_size, samples["reconstruct"])
        trained = sum(s[kind]["train_step"] + each * s[kind]["train_sample"] for kind in inside)
        twice = len(inside) / len(kinds)
        through = (samples["reconstruct"] + HOLDOUT_SAMPLES) * all_pass * (1 + twice)
        seconds["reconstruct"] = (
            r.steps * trained
            + through
            # A block that does not stay runs again in the backward pass.
            + weighing * sum(s[kind]["importance"] + (1 - kept) * s[kind]["pass"] for kind in kinds)
            + reading(2 * -(-weighing // r.importance_batch) + 3 * twice)
        )
    if d.steps:
        again = d.batch_size * all_pass if d.lean else 0.0  # blocks run again in the backward pass
        seconds["distill"] = d.steps * (all_train + again if step_seconds is None else step_seconds)
    seconds["round" if not pairs else "write"] = sum(s[kind]["round"] for kind in kinds)
    rounded = sum(run["bytes"][f"rounded_{kind}"] for kind in kinds)
    stages = 1 + bool(recipe.compensation) + bool(r.steps) if runs_model else 1
    shared = run["bytes"].get("trajectory", 0)  # the first measurements counted it into every pair
    disk = pairs * run["bytes"]["pair"] + count * shared + stages * rounded + checkpoint_bytes(recipe, weights)
    total = sum(seconds.values()) / 3600
    return {
        "recipe": recipe.name,
        "hours": {stage: value / 3600 for stage, value in seconds.items()},
        "total_hours": total,
        "by_peak_hours": scaled(run["device"], total),
        "samples": samples,
        "pairs": pairs,
        "disk_bytes": disk,
        "distillation_bytes": training_bytes(recipe, weights),
        "offloaded_bytes": offloaded_bytes(recipe, weights),
        "step_seconds": step_seconds,
    }


def measured_step(runs: Iterable[Mapping[str, Any]], run: Mapping[str, Any], recipe: Recipe) -> float | None:
    """Seconds of a step of `recipe` on the device and model of `run`, from the newest such of `runs` (of
    `distillation.measure_steps`); None where its batch size was not measured, or did not fit."""
    wanted = {"recipe": recipe.name, "batch_size": recipe.distillation.batch_size}
    wanted |= {"latent_store": recipe.streaming.latent_store}
    wanted |= {name: run.get(name) for name in ("model", "device", "pixels", "text_tokens")}
    wanted |= {"compile_blocks": recipe.distillation.compile_blocks and run["peak_of"] == "GPU"}
    flat = ({"latent_store": "device", **r, **r["settings"]} for r in runs if r["fits"])
    found = [r for r in flat if all(r.get(name) == value for name, value in wanted.items())]
    return found[-1]["seconds"] if found else None


def _fit(run: Mapping[str, Any], recipe: Recipe, copies: int) -> int:
    return int(recipe.streaming.budget_bytes // (copies * run["bytes"]["streams"]))


def scaled(device: str, hours: float) -> dict[str, float]:
    """Hours on other cards by the ratio of their bf16 peaks; empty where `device` is none of them."""
    here = next((peak for name, peak in BF16_PEAK.items() if name in device), None)
    return {} if here is None else {name: hours * here / peak for name, peak in BF16_PEAK.items() if name not in device}


def table(run: Mapping[str, Any], projections: Sequence[Mapping[str, Any]]) -> str:
    """What was measured and what follows, in plain text."""
    unit = "GPU memory" if run["peak_of"] == "GPU" else "memory of the process"
    lines = [
        f"{run['model']} blocks, random weights, {run['pixels']}x{run['pixels']}, {run['dtype']}, on {run['device']}",
        f"{'':20}{'double':>12}{'single':>12}",
    ]
    for part in run["seconds"][DOUBLE]:
        lines.append(f"{part:20}" + "".join(f"{run['seconds'][kind][part]:>11.4g}s" for kind in KINDS))
    lines += [f"peak {unit}: " + ", ".join(f"{k} {v / 2**30:.2f} GiB" for k, v in run["peak_bytes"].items()), ""]
    lines.append(f"projected to {run['depth'][DOUBLE]} + {run['depth'][SINGLE]} blocks (a sum of the parts above):")
    for p in projections:
        parts = ", ".join(f"{stage} {h:.2f}" for stage, h in p["hours"].items())
        line = f"  {p['recipe']:14}{p['total_hours']:>9.2f} h  ({parts}); disk {p['disk_bytes'] / 1e9:.1f} GB"
        if p["distillation_bytes"]:
            line += f"; end-to-end training needs {p['distillation_bytes'] / 1e9:.1f} GB beside its activations"
        lines.append(line)
        if p["by_peak_hours"]:
            others = ", ".join(f"{n} {h:.1f} h" for n, h in p["by_peak_hours"].items())
            lines.append(f"    by bf16 peak, not measured: {others}")
    return "\n".join(lines)
