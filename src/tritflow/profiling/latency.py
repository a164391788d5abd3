"""Time of whole generations: text encoders, sampler and VAE of a FluxPipeline, dense against ternary.

Every ternary candidate runs diffusers' own forward, and another time `tritflow.optimize`, which dense models lack.

All candidates live in one process and take turns, each round in another order, so that a busy machine slows them
alike. A ternary variant is compared with the faster of dense bf16 and fp32.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from tritflow import results
from tritflow.models.flux1_fused import FusedFlux1
from tritflow.modules import TernaryLinear
from tritflow.pipelines.flags import flags
from tritflow.pipelines.generate import generate
from tritflow.pipelines.loading import generation_defaults, load_pipeline, pick_device, quiet
from tritflow.pipelines.optimize import optimize

PROMPT = "a red star to the left of a blue ring"
DENSE = ("dense fp32", "dense bf16")


class Variant(NamedTuple):
    """One candidate.

    Attributes:
        name: how results call it.
        dtype: of what is not ternary.
        mode: of what is; None: dense.
        optimized: whether `tritflow.optimize` took over its forward.
    """

    name: str
    dtype: str
    mode: str | None
    optimized: bool = False


VARIANTS = (
    Variant("dense fp32", "float32", None),
    Variant("dense bf16", "bfloat16", None),
    Variant("W2A16 fp32", "float32", "w2a16"),
    Variant("W2A16 bf16", "bfloat16", "w2a16"),
    Variant("W2A8 fp32", "float32", "w2a8"),
    Variant("W2A8 bf16", "bfloat16", "w2a8"),
    Variant("W2A16 fp32 optimized", "float32", "w2a16", True),
    Variant("W2A16 bf16 optimized", "bfloat16", "w2a16", True),
    Variant("W2A8 fp32 optimized", "float32", "w2a8", True),
    Variant("W2A8 bf16 optimized", "bfloat16", "w2a8", True),
)

Progress = Callable[[int, int], None]


def resident_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers as they are now: packed trits with what kernels keep beside them."""
    total = 0
    for part in module.modules():
        tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        # `nbytes` of a packed weight counts its bytes, not its logical shape.
        total += sum(tensor.nbytes for tensor in tensors)
        if isinstance(part, TernaryLinear):
            total += part.expanded_bytes
    fused = getattr(module.forward, "__self__", None)
    if not isinstance(fused, FusedFlux1):
        return total
    # Layers of joint products have no form of their own; those that nothing joins are the product's own layers.
    alone = sum(part.expanded_bytes for part in module.modules() if isinstance(part, TernaryLinear))
    return total - alone + fused.expanded_bytes


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80 by linear interpolation; one value is all three."""
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@torch.no_grad()
def measure(
    dense: str | Path = "small",
    ternary: str | Path = "small-student",
    *,
    base: str | Path | None = None,
    device: str = "cpu",
    batch_sizes: Sequence[int] = (1, 4),
    rounds: int = 7,
    note: str = "",
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time whole generations of a dense model and its ternary twin.

    Args:
        dense: the model in full precision: a folder, hub id or built-in name.
        ternary: its ternary twin.
        base: pipeline that completes a bare ternary transformer; see `pipelines.loading`.
        device: where to run.
        batch_sizes: pictures drawn at once; every size is a comparison of its own.
        rounds: generations of every candidate and batch size that count; one before them does not.
        note: kept in the results.
        progress: called with (generations done, generations in all).

    Returns:
        Runs for `tritflow.results`, one a candidate and batch size: `label`; `milliseconds` for one picture (wall time
        of a batch divided by its size) at p20/p50/p80; `speed`: p50 of the faster dense type over this p50, within the
        same rounds; `speed_paired`: the quantiles of that ratio round by round; `cpu_milliseconds`: processor time of
        one picture, which a busy machine disturbs less; `resident_bytes` of the transformer, expanded weights included;
        `spread`: (p80 - p20) / p50; the load average before and after; threads, size and steps.

    Raises:
        ModelError, DeviceError: a model or the device is not there.
        ValueError: no rounds or no batch size.
    """
    if rounds < 1 or not batch_sizes or min(batch_sizes) < 1:
        raise ValueError("latency needs at least one round and batch sizes from 1 on")
    on = pick_device(device)
    with quiet():
        pipes = {
            v.name: load_pipeline(
                ternary if v.mode else dense,
                base=base if v.mode else None,
                device=on,
                dtype=v.dtype,
                mode=v.mode,
            )
            for v in VARIANTS
        }
        for v in VARIANTS:
            if v.optimized:
                optimize(pipes[v.name])
    defaults = generation_defaults(pipes[DENSE[0]])
    total, done = len(pipes) * len(batch_sizes) * (rounds + 1), 0
    rows: list[dict[str, Any]] = []
    source = results.provenance(str(on))
    for batch in batch_sizes:

        def draw(pipe: Any, size: int = batch) -> tuple[float, float]:
            nonlocal done
            wall, cpu = time.perf_counter(), time.process_time()
            generate(
                pipe,
                [PROMPT] * size,
                range(size),
                # The same work for all, whichever folder a pipeline came from.
                height=defaults.height,
                width=defaults.width,
                num_inference_steps=defaults.num_inference_steps,
                guidance_scale=defaults.guidance_scale,
                max_sequence_length=defaults.max_sequence_length,
                batch_size=size,
            )
            taken = time.perf_counter() - wall, time.process_time() - cpu
            done += 1
            if progress:
                progress(done, total)
            return taken[0] * 1e3 / size, taken[1] * 1e3 / size

        before = _load()
        times: dict[str, list[float]] = {name: [] for name in pipes}
        cpu_times: dict[str, list[float]] = {name: [] for name in pipes}
        resident: dict[str, int] = {}
        names = list(pipes)
        for turn in range(rounds + 1):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                wall, cpu = draw(pipes[name])
                if turn:
                    times[name].append(wall)
                    cpu_times[name].append(cpu)
                else:  # expands weights and warms caches
                    resident[name] = resident_bytes(pipes[name].transformer)
        after = _load()
        for name, summary in compare(times).items():
            rows.append(
                {
                    **source,
                    "label": f"{name}, batch {batch}",
                    "variant": name,
                    "models": {"dense": Path(dense).name, "ternary": Path(ternary).name},
                    "batch": batch,
                    **summary,
                    "cpu_milliseconds": quantiles(cpu_times[name]),
                    "resident_bytes": resident[name],
                    "flags": flags(pipes[name], on),
                    "rounds": rounds,
                    "threads": torch.get_num_threads(),
                    "load_before": before,
                    "load_after": after,
                    "settings": {
                        "height": defaults.height,
                        "width": defaults.width,
                        "num_inference_steps": defaults.num_inference_steps,
                        "max_sequence_length": defaults.max_sequence_length,
                    },
                    "note": note,
                }
            )
    return rows


def compare(times: dict[str, list[float]]) -> dict[str, dict[str, Any]]:
    """Milliseconds, spread, and speed against the dense type with the smaller median.

    Args:
        times: candidate -> milliseconds, the same number of rounds each; both of `DENSE` among them.
    """
    rival = min(DENSE, key=lambda name: statistics.median(times[name]))
    found: dict[str, dict[str, Any]] = {}
    for name, values in times.items():
        ms = quantiles(values)
        paired = quantiles([r / v for r, v in zip(times[rival], values, strict=True)])
        found[name] = {
            "milliseconds": ms,
            "spread": (ms["p80"] - ms["p20"]) / ms["p50"],
            "against": rival,
            "speed": quantiles(times[rival])["p50"] / ms["p50"],
            "speed_paired": paired,
        }
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The runs in plain text."""
    first = rows[0]
    settings = first["settings"]
    lines = [
        f"{first['device']}, {first['threads']} threads, {settings['height']}x{settings['width']}, "
        f"{settings['num_inference_steps']} steps, {first['rounds']} rounds, load {first['load_before']}",
        f"{'':22} {'p20':>9} {'p50':>9} {'p80':>9}  ms a picture   speed  resident",
    ]
    for row in rows:
        ms = row["milliseconds"]
        lines.append(
            f"{row['label']:22} {ms['p20']:9.1f} {ms['p50']:9.1f} {ms['p80']:9.1f}               "
            f"{row['speed']:6.2f}x {row['resident_bytes'] / 1e6:7.1f} MB"
        )
    return "\n".join([*lines, "speed: against the faster of dense bf16 and fp32"])
