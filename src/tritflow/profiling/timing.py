"""Time of short GPU work: CUDA graph replays, candidates taking turns in random order."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch


@dataclass
class Candidate:
    """Something to time: ``run(i)`` does the product with input set i of ``sets``."""

    name: str
    run: Callable[[int], Any]
    sets: int


def _captured(candidate: Candidate) -> tuple[torch.cuda.CUDAGraph, float]:
    """A graph of one run on each set, and its milliseconds."""
    for i in range(min(2, candidate.sets)):
        candidate.run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(candidate.sets):
            candidate.run(i)
    graph.replay()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    graph.replay()
    torch.cuda.synchronize()
    return graph, (time.perf_counter() - begin) * 1e3


def _block(graph: torch.cuda.CUDAGraph, replays: int, sets: int) -> list[float]:
    """Microseconds a call of `replays` replays, after as many unmeasured ones."""
    for _ in range(replays):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e3 / sets for a, b in pairwise(events)]


def _quantiles(values: list[float]) -> dict[str, float]:
    cut = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
    return {"p20": cut[0], "p50": statistics.median(values), "p80": cut[3]}


def paired_times(
    ours: Candidate, rival: Candidate, *, rounds: int = 9, milliseconds: float = 12.0
) -> dict[str, dict[str, float]]:
    """Two candidates in turn, block behind block: what the GPU's power and temperature do to one they do to the other.

    Returns quantiles of microseconds a call by name, and of "ratio": the rival's median over ours, pair by pair.
    """
    graphs = [(c, *_captured(c)) for c in (ours, rival)]
    times: list[list[float]] = [[], []]
    ratios = []
    for turn in range(rounds):
        medians = [0.0, 0.0]
        for k in (0, 1) if turn % 2 else (1, 0):
            candidate, graph, one = graphs[k]
            found = _block(graph, max(3, math.ceil(milliseconds / max(one, 1e-3))), candidate.sets)
            times[k] += found
            medians[k] = statistics.median(found)
        ratios.append(medians[1] / medians[0])
    return {
        ours.name: _quantiles(times[0]),
        rival.name: _quantiles(times[1]),
        "ratio": _quantiles(ratios),
    }


def graph_times(
    candidates: list[Candidate], *, rounds: int = 3, milliseconds: float = 40.0
) -> dict[str, dict[str, Any]]:
    """Microseconds a call, by CUDA graph replays; rounds go over all candidates, each in an order of its own.

    Each block is preceded by as many unmeasured replays of the same candidate, so that clock and temperature are its
    own and not those of whichever came before it.
    Returns {"p20", "p50", "p80"} over the blocks' replays, by name; a candidate that fails gives no entry.
    """
    ready: list[tuple[Candidate, torch.cuda.CUDAGraph, int]] = []
    out: dict[str, dict[str, Any]] = {}
    for candidate in candidates:
        try:
            graph, one = _captured(candidate)
            ready.append((candidate, graph, max(3, math.ceil(milliseconds / max(one, 1e-3)))))
        except Exception as error:
            out[candidate.name] = {"error": str(error).splitlines()[0][:200]}
    samples: dict[str, list[float]] = {c.name: [] for c, _, _ in ready}
    order = random.Random(0)
    for _ in range(rounds):
        for candidate, graph, replays in order.sample(ready, len(ready)):
            samples[candidate.name] += _block(graph, replays, candidate.sets)
    return out | {name: _quantiles(values) for name, values in samples.items()}
