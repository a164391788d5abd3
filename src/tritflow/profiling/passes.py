"""Passes between products against copies of as many bytes: what share of the memory's speed do they reach?"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritflow.profiling.timing import Candidate, graph_times

SHAPES = [(4608, 3072), (4096, 3072), (512, 3072)]
"""(tokens, features) that FLUX.1-dev normalises at 1024x1024."""
_CACHE = 160e6  # sets of inputs together are larger


def _sets(moved: float) -> int:
    return max(2, min(64, math.ceil(_CACHE / moved)))


def adaln_tiles(
    x: list[Tensor], shift: Tensor, scale: Tensor, dtype: str
) -> tuple[list[tuple[dict[str, int], Callable[[int], Any]]], dict[str, str]]:
    """Settings of adaLN + quantize that compute the right thing, each with its call on x[i]; what is wrong with the
    others, by label."""
    from tritflow.kernels import reference
    from tritflow.kernels.triton import adaln

    q, row = reference.adaln_quantize(x[0], shift, scale, None, dtype)
    right: list[tuple[dict[str, int], Callable[[int], Any]]] = []
    wrong: dict[str, str] = {}
    for tile in adaln.TILES:

        def run(i: int, tile: dict[str, int] = tile) -> Any:
            return adaln.adaln_quantize(x[i], shift, scale, None, dtype, tile=tile)

        other, rows = run(0)
        apart = (other.float() - q.float()).ne(0).float().mean().item()
        off = ((rows - row).abs() / row).max().item()
        if apart < 0.01 and off < 1e-4:
            right.append((tile, run))
        else:
            wrong[adaln.label(tile)] = f"wrong: {apart:.2%} of the bytes differ, scales by {off:.2g}"
    return right, wrong


def measure(tokens: int, features: int) -> dict[str, Any]:
    """Microseconds, bytes and shares of the faster of two copies (the copy engine's way, and a kernel's).

    Bytes are those that have to move: inputs read once, outputs written once. A copy moves as many, half of them in.
    """
    from tritflow.kernels import adaln_quantize, gelu_quantize, quantize_activation
    from tritflow.kernels.triton import adaln

    shift, scale = (torch.randn(1, features, device="cuda").bfloat16() for _ in range(2))
    moved = tokens * features * 3 + tokens * 4
    sets = _sets(moved)
    x = [torch.randn(1, tokens, features, device="cuda").bfloat16() for _ in range(sets)]
    words = moved // 8
    source = [torch.randint(0, 1 << 30, (words,), device="cuda", dtype=torch.int32) for _ in range(sets)]
    target = [torch.empty_like(s) for s in source]
    candidates = [
        Candidate("copy", lambda i: target[i].copy_(source[i]), sets),
        Candidate("copy by a kernel", lambda i: torch.bitwise_not(source[i], out=target[i]), sets),
    ]

    wrong: dict[str, str] = {}

    def tiles(dtype: str) -> list[Candidate]:
        right, others = adaln_tiles(x, shift, scale, dtype)
        wrong.update({f"adaln_quantize {dtype}, {label}": why for label, why in others.items()})
        return [Candidate(f"adaln_quantize {dtype}, {adaln.label(tile)}", run, sets) for tile, run in right]

    def ours(dtype: str) -> list[Candidate]:
        return [
            Candidate(f"adaln_quantize {dtype}", lambda i: adaln_quantize(x[i], shift, scale, None, dtype), sets),
            Candidate(f"gelu_quantize {dtype}", lambda i: gelu_quantize(x[i], None, None, dtype), sets),
            Candidate(f"quantize {dtype}", lambda i: quantize_activation(x[i], None, dtype), sets),
        ]

    for dtype in ("int8", "float8_e4m3fn"):
        candidates += [*ours(dtype), *tiles(dtype)]
    times = graph_times(candidates)
    us = {name: t["p50"] for name, t in times.items() if "p50" in t}
    best = min(us["copy"], us["copy by a kernel"])
    return {
        "microseconds": times,
        "wrong": wrong,
        "bytes": moved,
        "copy_tb_s": moved / best / 1e6,
        "share": {name: best / t for name, t in us.items()},
    }
