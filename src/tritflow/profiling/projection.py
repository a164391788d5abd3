"""Hours, memory and disk that a recipe takes on a whole model, from what one block of each kind was measured to take.

A sum of measured parts, no measurement itself: time is taken as proportional to samples, steps and blocks, whatever the
batch size; text encoders, the VAE and pauses of the disk are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tritflow.config import Recipe
from tritflow.distillation.reconstruction import HOLDOUT_SAMPLES, streams_alive, windows
from tritflow.pipelines.quantize_job import needs_teacher, training_bytes

DOUBLE, SINGLE = "double", "single"
KINDS = (DOUBLE, SINGLE)

BF16_PEAK = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "RTX 4090": 165.0}
"""Dense bf16 TFLOP/s with fp32 accumulation, from NVIDIA's data sheets (SXM for the first three)."""


def project(run: dict[str, Any], recipe: Recipe, prompts: int = 7232) -> dict[str, Any]:
    """One recipe on the model that `run` (of `quantization.measure`) stands for.

    Args:
        prompts: how many there are where the recipe takes all.

    Returns:
        `hours` by stage and in all; `samples` kept after the activation budget; `disk_bytes` of trajectories and
        roundings; `distillation_bytes`: what end-to-end training needs on the GPU before any activation (0: none).
    """
    kinds = [DOUBLE] * run["depth"][DOUBLE] + [SINGLE] * run["depth"][SINGLE]
    s, c, r, d = run["seconds"], recipe.calibration, recipe.reconstruction, recipe.distillation
    all_read, all_pass = (sum(s[kind][part] for kind in kinds) for part in ("read", "pass"))
    all_train = sum(s[kind]["train_sample"] for kind in kinds)
    seconds: dict[str, float] = {}
    count = min(c.num_prompts or prompts, prompts)
    runs_model = needs_teacher(recipe)
    pairs = count * c.num_inference_steps if runs_model else 0
    if pairs:
        calls = -(-count // c.batch_size) * c.num_inference_steps
        seconds["record"] = pairs * all_pass + calls * all_read
    samples: dict[str, int] = {}
    if recipe.smoothing is not None:
        asked = min(recipe.compensation_samples, pairs)
        seconds["range"] = asked * all_pass + -(-asked // c.batch_size) * all_read
    if recipe.compensation:
        samples["compensate"] = min(recipe.compensation_samples, pairs, _fit(run, recipe, 1))
        once = sum(s[kind]["compensate_block"] for kind in kinds)
        seconds["compensate"] = once + samples["compensate"] * sum(s[kind]["compensate_sample"] for kind in kinds)
    if r.steps:
        fit = _fit(run, recipe, streams_alive(r.window)) - HOLDOUT_SAMPLES
        samples["reconstruct"] = min(r.samples, pairs, max(1, fit))
        weighing = min(r.importance_samples, pairs)
        plan = windows(len(kinds), r.window, r.stride)
        trained = sum(s[kinds[i]]["train_sample"] for w in plan for i in range(w.first, w.stop))
        twice = len([i for w in plan for i in range(w.first, w.stop)]) / len(kinds)  # blocks of overlapping windows
        through = (samples["reconstruct"] + HOLDOUT_SAMPLES) * all_pass * (1 + twice)
        seconds["reconstruct"] = (
            r.steps * min(r.batch_size, samples["reconstruct"]) * trained
            + through
            + weighing * sum(s[kind]["importance"] for kind in kinds)
            + (2 * -(-weighing // r.importance_batch) + 3 * twice) * all_read
        )
    if d.steps:
        again = all_pass if d.lean else 0.0  # blocks run again in the backward pass
        seconds["distill"] = d.steps * d.batch_size * (all_train + again)
    seconds["round" if not pairs else "write"] = sum(s[kind]["round"] for kind in kinds)
    weights = sum(run["parameters"][kind] for kind in kinds)
    rounded = sum(run["bytes"][f"rounded_{kind}"] for kind in kinds)
    stages = 1 + bool(recipe.compensation) + bool(r.steps) if runs_model else 1
    return {
        "recipe": recipe.name,
        "hours": {stage: value / 3600 for stage, value in seconds.items()},
        "total_hours": sum(seconds.values()) / 3600,
        "samples": samples,
        "pairs": pairs,
        "disk_bytes": pairs * run["bytes"]["pair"] + stages * rounded,
        "distillation_bytes": training_bytes(recipe, weights),
    }


def _fit(run: dict[str, Any], recipe: Recipe, copies: int) -> int:
    return int(recipe.streaming.budget_bytes // (copies * run["bytes"]["streams"]))


def scaled(device: str, hours: float) -> dict[str, float]:
    """Hours on other cards by the ratio of their bf16 peaks; empty where `device` is none of them."""
    here = next((peak for name, peak in BF16_PEAK.items() if name in device), None)
    return {} if here is None else {name: hours * here / peak for name, peak in BF16_PEAK.items() if name not in device}


def table(run: dict[str, Any], projections: Sequence[dict[str, Any]]) -> str:
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
        others = scaled(run["device"], p["total_hours"])
        if others:
            lines.append("    by bf16 peak, not measured: " + ", ".join(f"{n} {h:.1f} h" for n, h in others.items()))
    return "\n".join(lines)
