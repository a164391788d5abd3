"""The first factor of a low-rank update on quantized rows: its settings, checked and timed against reading the rows."""

from __future__ import annotations

import math
from typing import Any

import torch

from tritflow.profiling.products import quantized
from tritflow.profiling.timing import Candidate, graph_times

SHAPES = [(4608, 48, 3072), (4608, 64, 3072), (4608, 16, 3072), (4608, 16, 12288), (4608, 16, 15360), (512, 48, 3072)]
"""(tokens, columns, features) of a LoRA of rank 16 on FLUX.1-dev at 1024x1024: q, k, v together, and with the MLP."""
SETTINGS: list[dict[str, int]] = [
    {"BLOCK_M": 16, "BLOCK_K": 64, "PARTS": 8, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_K": 64, "PARTS": 8, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 32, "BLOCK_K": 32, "PARTS": 8, "num_warps": 8, "num_stages": 4},
    {"BLOCK_M": 32, "BLOCK_K": 64, "PARTS": 4, "num_warps": 4, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_K": 32, "PARTS": 8, "num_warps": 8, "num_stages": 3},
    {"BLOCK_M": 64, "BLOCK_K": 64, "PARTS": 4, "num_warps": 4, "num_stages": 3},
]
"""A block reads its part of the factor again, so tiles of many tokens read least and leave the fewest blocks."""


def blocks(setting: dict[str, int], columns: int) -> dict[str, int]:
    """A setting with the tile's columns, as `low_rank_down` takes it."""
    from tritflow.kernels.triton.low_rank import down_blocks

    return {**setting, "BLOCK_C": down_blocks(4608, columns, 16)["BLOCK_C"]}


def label(setting: dict[str, int]) -> str:
    return "{BLOCK_M} tokens, {PARTS} parts of {BLOCK_K}, {num_stages} stages".format(**setting)


def candidates(tokens: int, columns: int, features: int, kind: str) -> tuple[list[Candidate], dict[str, str]]:
    """What runs for rows of a dtype, `fixed choice` among it, and why others do not: errors by name."""
    from tritflow.kernels import low_rank_down, reference
    from tritflow.kernels.triton.low_rank import low_rank_down as run

    sets = max(2, min(12, math.ceil(160e6 / (tokens * features))))
    rows = [quantized(tokens, features, reference.QTYPE[kind]) for _ in range(sets)]
    down = torch.randn(columns, features, device="cuda").bfloat16() * features**-0.5
    truth = reference.low_rank_down(*rows[0], down).float()
    found = [Candidate("fixed choice", lambda i: low_rank_down(*rows[i], down), sets)]
    errors: dict[str, str] = {}
    for setting in SETTINGS:
        tiles = blocks(setting, columns)
        found.append(Candidate(label(setting), lambda i, tiles=tiles: run(*rows[i], down, tiles), sets))  # type: ignore[misc]
    ready = []
    for candidate in found:
        try:
            error = ((candidate.run(0).float() - truth).norm() / truth.norm()).item()
        except RuntimeError as problem:  # does not fit the shared memory, for one
            if "CUDA error" in str(problem):
                raise
            errors[candidate.name] = str(problem).splitlines()[0][:160]
            continue
        if error < 0.01:
            ready.append(candidate)
        else:
            errors[candidate.name] = f"wrong: relative error {error:.3g}"
    return ready, errors


def measure(tokens: int, columns: int, features: int) -> dict[str, Any]:
    """Microseconds of every setting for int8 and e4m3 rows, and TB/s at which the fastest reads the rows."""
    result: dict[str, Any] = {}
    for kind in ("int8", "float8_e4m3fn"):
        ready, errors = candidates(tokens, columns, features, kind)
        times = graph_times(ready, milliseconds=15.0)
        us = {name: t["p50"] for name, t in times.items() if "p50" in t}
        fastest = min(us, key=us.__getitem__) if us else ""
        entry: dict[str, Any] = {"microseconds": times, "errors": errors, "fastest": fastest}
        result[kind] = entry | ({"tb_s": tokens * features / us[fastest] / 1e6} if us else {})
    return result
