"""Ternary linears on the CPU against `F.linear`, for `tritflow bench kernels --device cpu`.

Two regimes: one large layer, where arithmetic decides, and the 104 layers of a step of a small FLUX (hidden 256), where
the overhead of a call does. All candidates take turns within one run, so that a busy machine slows them
alike; ratios are of medians of the same run. W2A8 pays for quantizing every input: only layers that read the same
tensor in a model share that here too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow import results
from tritflow.formats.packing import pack_2bit
from tritflow.modules import TernaryLinear


class Product(NamedTuple):
    """One linear layer's product."""

    tokens: int
    out_features: int
    in_features: int
    same_input: bool = False
    """Whether it reads the very tensor that the layer before it reads, as key does after query."""


LARGE = Product(1024, 9216, 3072)
IMAGE_TOKENS, TEXT_TOKENS, HIDDEN = 64, 48, 256


def small_step(batch: int) -> list[Product]:
    """Every block linear in one step of 4 double and 8 single blocks, in order."""
    image, text, both = (batch * t for t in (IMAGE_TOKENS, TEXT_TOKENS, IMAGE_TOKENS + TEXT_TOKENS))
    h = HIDDEN
    double = [Product(batch, 6 * h, h)] * 2
    for tokens in (image, text):
        double += [Product(tokens, h, h), *[Product(tokens, h, h, True)] * 2, Product(tokens, h, h)]
        double += [Product(tokens, 4 * h, h), Product(tokens, h, 4 * h)]
    single = [Product(batch, 3 * h, h), Product(both, 4 * h, h), *[Product(both, h, h, True)] * 3]
    return double * 4 + [*single, Product(both, h, 5 * h)] * 8


def _quantiles(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"p20": cuts[1] * 1e3, "p50": cuts[4] * 1e3, "p80": cuts[7] * 1e3}


def take_turns(candidates: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, float]]:
    """Milliseconds of each candidate at p20, p50 and p80; they run in turn until `seconds` have passed."""
    for run in candidates.values():
        for _ in range(3):
            run()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(times.values()))) < 5:
        for name, run in candidates.items():
            run()  # the candidate before left its own data in the caches
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: _quantiles(values) for name, values in times.items()}


def _layer(n: int, k: int, mode: Any, seed: int) -> TernaryLinear:
    g = torch.Generator().manual_seed(seed)
    layer = TernaryLinear(k, n, mode=mode)
    layer.set_packed_(pack_2bit(torch.randint(-1, 2, (n, k), generator=g, dtype=torch.int8)))
    layer.weight_scale.copy_(torch.rand(n, generator=g) * 0.02 + 0.01)
    return layer


def _candidates(shapes: list[Product]) -> tuple[dict[str, Callable[[], Any]], list[nn.Module]]:
    """One pass over `shapes` as dense fp32 and bf16 and as ternary in both modes and types."""
    candidates: dict[str, Callable[[], Any]] = {}
    layers: list[nn.Module] = []

    def passes(run: list[Callable[[Tensor], Tensor]], inputs: list[Tensor]) -> Callable[[], None]:
        def go() -> None:
            alias = inputs[0]
            for f, x, shape in zip(run, inputs, shapes, strict=True):
                if not shape.same_input:
                    alias = x.view_as(x)  # as new to whoever remembers what it quantized
                f(alias)

        return go

    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        by_shape = {(m, k): torch.randn(m, k).to(dtype) for m, _, k, _ in shapes}
        inputs = [by_shape[m, k] for m, _, k, _ in shapes]
        dense: list[Callable[[Tensor], Tensor]] = []
        for i, (_, n, k, _) in enumerate(shapes):
            weight, bias = _layer(n, k, "w2a16", i).dequantize(dtype), torch.zeros(n, dtype=dtype)
            dense.append(lambda x, w=weight, b=bias: F.linear(x, w, b))  # type: ignore[misc]
        candidates[f"dense {name}"] = passes(dense, inputs)
        for mode in ("w2a16", "w2a8"):
            mine = [_layer(n, k, mode, i).to(dtype) for i, (_, n, k, _) in enumerate(shapes)]
            layers += mine
            candidates[f"{mode} {name}"] = passes(list(mine), inputs)
    return candidates, layers


def _summary(shapes: list[Product], seconds: float) -> dict[str, Any]:
    candidates, layers = _candidates(shapes)
    times = take_turns(candidates, seconds)
    rival = min(("dense fp32", "dense bf16"), key=lambda name: times[name]["p50"])
    ratios = {
        mode: round(times[rival]["p50"] / min(times[f"{mode} {t}"]["p50"] for t in ("fp32", "bf16")), 3)
        for mode in ("w2a16", "w2a8")
    }
    resident: dict[str, int] = {}
    for layer in layers:
        assert isinstance(layer, TernaryLinear)
        assert layer.bias is not None
        kind = f"{layer.mode} {'fp32' if layer.bias.dtype == torch.float32 else 'bf16'}"
        resident[kind] = resident.get(kind, 0) + layer.packed.nbytes + layer.expanded_bytes
    weights = sum(shape.out_features * shape.in_features for shape in shapes)
    resident |= {"dense fp32": weights * 4, "dense bf16": weights * 2}
    return {"milliseconds": times, "fastest_dense": rival, "speedup": ratios, "resident_bytes": resident}


@torch.no_grad()
def bench_cpu(seconds: float = 10.0, note: str = "") -> dict[str, Any]:
    """Measure both regimes.

    Args:
        seconds: for each of the three comparisons.
        note: kept in the result, for instance that the machine was busy.

    Returns:
        A run for `tritflow.results`: for each comparison milliseconds at p20/p50/p80, `speedup` (median of the faster
        dense type over the faster type of each ternary mode) and `resident_bytes` of the weights; the load average.
    """
    torch.manual_seed(0)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    m, n, k, _ = LARGE
    return {
        **results.provenance("cpu"),
        "threads": torch.get_num_threads(),
        "load_before": load,
        "note": note,
        "comparisons": {
            f"{k} -> {n}, {m} tokens": _summary([LARGE], seconds),
            "small FLUX step, 104 linears, batch 1": _summary(small_step(1), seconds),
            "small FLUX step, 104 linears, batch 8": _summary(small_step(8), seconds),
        },
    }


def table(run: dict[str, Any]) -> str:
    """The run in plain text."""
    lines = [f"{run['device']}, {run['threads']} threads, torch {run['versions']['torch']}"]
    for name, part in run["comparisons"].items():
        lines.append(f"{name}: speed-up over {part['fastest_dense']}: {part['speedup']}")
        for candidate, ms in part["milliseconds"].items():
            resident = part["resident_bytes"][candidate] / 2**20
            lines.append(f"  {candidate:12} {ms['p20']:9.3f} {ms['p50']:9.3f} {ms['p80']:9.3f} ms  {resident:7.1f} MiB")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """`python -m tritflow.profiling.cpu [--seconds S] [--out FILE]`: print, and append to a results file."""
    parser = argparse.ArgumentParser(prog="tritflow.profiling.cpu", description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each of three comparisons")
    parser.add_argument("--out", help="results file to append to")
    parser.add_argument("--note", default="", help="kept with the result")
    given = parser.parse_args(arguments)
    run = bench_cpu(given.seconds, given.note)
    print(table(run))
    if given.out:
        results.append(given.out, "kernels-cpu", run)


if __name__ == "__main__":
    main()
