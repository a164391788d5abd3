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
            one = (time.perf_counter() - begin) * 1e3
            ready.append((candidate, graph, max(3, math.ceil(milliseconds / max(one, 1e-3)))))
        except Exception as error:
            out[candidate.name] = {"error": str(error).splitlines()[0][:200]}
    samples: dict[str, list[float]] = {c.name: [] for c, _, _ in ready}
    order = random.Random(0)
    for _ in range(rounds):
        for candidate, graph, replays in order.sample(ready, len(ready)):
            for _ in range(replays):
                graph.replay()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
            events[0].record()
            for event in events[1:]:
                graph.replay()
                event.record()
            torch.cuda.synchronize()
            samples[candidate.name] += [a.elapsed_time(b) * 1e3 / candidate.sets for a, b in pairwise(events)]
    for name, values in samples.items():
        cut = statistics.quantiles(values, n=5) if len(values) > 1 else [values[0]] * 4
        out[name] = {"p20": cut[0], "p50": statistics.median(values), "p80": cut[3]}
    return out
