"""Which layers the velocity depends on: the error when one linear alone is ternary, by layer, stream and timestep.

The dense model runs on recorded inputs of its own trajectories; one linear after the other is rounded, the velocity's
error measured, and the linear put back. Rounding is that of `ternarize` with nothing repaired, so the numbers say
where error comes from, not what a trained student keeps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.prompts import PromptSet, from_texts, load_prompts
from tritflow.calibration.trajectories import Batch
from tritflow.config import CalibrationConfig, Ternarizer
from tritflow.models import family_of
from tritflow.pipelines.scene_prompts import held_out_prompts
from tritflow.quantization.rounding import round_weight
from tritflow.quantization.ternarize import dequantize
from tritflow.results import provenance


class SensitivityError(ValueError):
    """The model or the prompts cannot be measured; says what to give instead."""


def measure(
    model: str,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    num_prompts: int = 8,
    num_inference_steps: int = 8,
    bins: int = 4,
    batch_size: int = 16,
    ternarizer: Ternarizer = "mse",
    column_scale: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure every block linear of a dense pipeline; one run for `results.append`.

    Args:
        model: as `load_pipeline` takes it.
        prompts: a file, texts, or None for the model folder's `calibration_prompts.txt`.
        num_prompts, num_inference_steps: trajectories and their steps; all pairs are used.
        bins: parts of [0, 1] into which timesteps fall.
        batch_size: pairs run at once.
        ternarizer, column_scale: the rounding.
        progress: called as (linears done, of how many).

    Returns:
        `layers`: for each linear its `block`, `kind`, `stream`, `weights`, and `error`: mean square of the velocity's
        change over the mean square of the velocity, in all and by timestep bin (null where a bin is empty).

    Raises:
        SensitivityError: a ternary model, or no prompts.
    """
    from tritflow.pipelines.loading import load_pipeline, quiet
    from tritflow.pipelines.teacher import record_trajectories

    with quiet():
        pipe = load_pipeline(model, device=device, dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    chosen = prompts_of(pipe, prompts)
    config = CalibrationConfig(
        num_prompts=min(num_prompts, len(chosen)), num_inference_steps=num_inference_steps, batch_size=batch_size
    )
    transformer, on = pipe.transformer, pipe._execution_device
    settings = {"_class_name": type(transformer).__name__, **transformer.config}
    family = family_of(settings)
    names = list(family.block_linears(settings))
    if any(type(transformer.get_submodule(name)) is not nn.Linear for name in names):
        raise SensitivityError(f"'{model}' is not dense; measure the model that it was made from")
    with tempfile.TemporaryDirectory(prefix="tritflow-sensitivity-") as folder:
        trajectories = record_trajectories(pipe, chosen, folder, config)
        indices = torch.arange(trajectories.size("all"))
        batches = [trajectories.pairs(part, "all", on) for part in indices.split(batch_size)]
        layers = measure_linears(
            transformer, names, batches, bins=bins, ternarizer=ternarizer, column_scale=column_scale, progress=progress
        )
    for layer in layers:
        name = layer["name"]
        block = next(b for b in family.block_order(settings) if name.startswith(f"{b}."))
        layer |= {"block": block, "kind": name.removeprefix(f"{block}."), "stream": family.stream_of(name)}
    return {
        "label": f"{Path(model).name}, {ternarizer}{' + columns' if column_scale else ''}",
        "model": Path(model).name,
        "rounding": {"ternarizer": ternarizer, "column_scale": column_scale},
        "prompts": chosen.sample(config.num_prompts, config.seed).describe(),
        "pairs": len(indices),
        "num_inference_steps": num_inference_steps,
        "bins": [round(i / bins, 6) for i in range(bins + 1)],
        "layers": layers,
        **provenance(str(on)),
    }


@torch.no_grad()
def measure_linears(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    *,
    bins: int,
    ternarizer: Ternarizer = "mse",
    column_scale: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[dict[str, Any]]:
    """Error of each linear alone; the model is left as it was, to the last bit.

    Args:
        model: called with a batch's kwargs and `return_dict=False`; `timestep` in [0, 1] is among them.
        names: dense linears.
        batches: on the model's device; their recorded velocities are not looked at, the model's own are.
    """
    before = [_velocity(model, batch) for batch in batches]
    bin_of = [(batch.kwargs["timestep"].float() * bins).long().clamp(0, bins - 1) for batch in batches]
    size = sum((v.square().mean() * len(v) for v in before), torch.zeros((), device=before[0].device))
    found = []
    for done, name in enumerate(names, 1):
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        kept = linear.weight.detach().clone()
        q = round_weight(kept, ternarizer, column_scale=column_scale)
        linear.weight.copy_(dequantize(q.trits, q.weight_scale, q.input_scale))
        errors = torch.zeros(bins, device=size.device)
        sizes = torch.zeros(bins, device=size.device)
        for batch, velocity, places in zip(batches, before, bin_of, strict=True):
            change = (_velocity(model, batch) - velocity).square().flatten(1).mean(dim=1)
            errors.index_add_(0, places, change)
            sizes.index_add_(0, places, velocity.square().flatten(1).mean(dim=1))
        linear.weight.copy_(kept)
        by_bin = [round(e / s, 9) if s else None for e, s in zip(errors.tolist(), sizes.tolist(), strict=True)]
        total = float(errors.sum() / size)
        found.append({"name": name, "weights": kept.numel(), "error": {"all": round(total, 9), "bins": by_bin}})
        if progress is not None:
            progress(done, len(names))
    return found


def table(run: dict[str, Any], count: int = 12) -> str:
    """The most sensitive linears and the sum of each stream, in plain text."""
    edges = run["bins"]
    heads = [f"t<{high:g}" for high in edges[1:]]
    lines = [
        f"{run['label']}: relative velocity error with one linear ternary, {run['pairs']} pairs, {run['device']}",
        f"{'':48} {'stream':>9} {'all':>9} " + " ".join(f"{h:>9}" for h in heads),
    ]

    def row(name: str, stream: str, error: dict[str, Any]) -> str:
        cells = " ".join(f"{'-' if e is None else format(e, '.5f'):>9}" for e in error["bins"])
        return f"{name:48} {stream:>9} {error['all']:9.5f} {cells}"

    worst = sorted(run["layers"], key=lambda layer: -layer["error"]["all"])
    lines += [row(layer["name"], layer["stream"], layer["error"]) for layer in worst[:count]]
    for stream, error in by_stream(run).items():
        lines.append(row("sum over linears", stream, error))
    return "\n".join(lines)


def by_stream(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sum of errors over the linears of each stream, in all and by bin."""
    streams = dict.fromkeys(layer["stream"] for layer in run["layers"])
    found = {}
    for stream in streams:
        mine = [layer["error"] for layer in run["layers"] if layer["stream"] == stream]
        columns = zip(*(error["bins"] for error in mine), strict=True)
        sums = [None if None in column else sum(column) for column in columns]
        found[stream] = {"all": sum(error["all"] for error in mine), "bins": sums}
    return found


def _velocity(model: nn.Module, batch: Batch) -> Tensor:
    velocity: Tensor = model(**batch.kwargs, return_dict=False)[0]
    return velocity.float()


def prompts_of(pipe: Any, prompts: str | Path | Sequence[str] | None) -> PromptSet:
    """A file's, `held-out:N`'s, the texts given, or the model folder's `calibration_prompts.txt`; `SensitivityError`
    without any."""
    if isinstance(prompts, str | Path):
        return held_out_prompts(str(prompts)) or load_prompts(prompts)
    if prompts is not None:
        return from_texts(prompts)
    folder = pipe.config.get("_name_or_path") or ""
    own = Path(folder) / "calibration_prompts.txt"
    if not folder or not own.is_file():
        raise SensitivityError("the model folder has no calibration_prompts.txt; name a file by --prompts")
    return load_prompts(own)
