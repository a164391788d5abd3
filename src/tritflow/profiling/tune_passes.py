"""What `tune` measures besides the large products: few rows, adaLN, LoRA's first factor, 8-bit attention.

Each entry is a list of choices that compute the right thing, with a candidate to time; the fastest is written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from tritflow.kernels import reference, tuning
from tritflow.kernels.tuning import Choice
from tritflow.profiling import first_factor
from tritflow.profiling.passes import adaln_tiles
from tritflow.profiling.products import SKINNY, pack, random_trits
from tritflow.profiling.timing import Candidate, graph_times

PARTS = ("few rows", "adaln", "first factor", "attention")
DTYPES = ("int8", "float8_e4m3fn")
ROWS = [(18432, 3072), (9216, 3072)]
"""(N, K) of FLUX.1-dev's modulation."""
TOKENS = ((4608, 3072), (4096, 3072), (512, 3072))
ATTENTION = (4608, 24, 128)

Options = list[tuple[Choice, Candidate]]


def few_rows(n: int, k: int) -> Options:
    """The product of one row of bf16: settings of the Hopper kernel, whose error is below half a percent."""
    from tritflow.kernels.hopper import why_not
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    if why_not() is not None:
        return []
    sets = max(2, math.ceil(160e6 / (n * k / 4)))
    x = torch.randn(1, k, device="cuda").bfloat16()
    weights = [random_trits(n, k) for _ in range(sets)]
    packed = [pack(w) for w in weights]
    row = torch.rand(n, device="cuda").bfloat16()
    truth = (x.double() @ weights[0].double().T) * row.double()
    found: Options = []
    for settings in SKINNY.values():

        def run(i: int, settings: dict[str, Any] = settings) -> Any:
            return w2a16_skinny(x, packed[i], row, **settings)

        if ((run(0).double() - truth).norm() / truth.norm()).item() < 0.005:
            choice = Choice("hopper", dict(settings))
            found.append((choice, Candidate(choice.label, run, sets)))
    return found


def adaln(tokens: int, features: int, dtype: str) -> Options:
    """Layer norm, modulation and quantization: settings whose scales are the reference's."""
    sets = max(2, math.ceil(160e6 / (3 * tokens * features)))
    shift, scale = (torch.randn(1, features, device="cuda").bfloat16() for _ in range(2))
    x = [torch.randn(1, tokens, features, device="cuda").bfloat16() for _ in range(sets)]
    choices = [(Choice("triton", dict(tile)), run) for tile, run in adaln_tiles(x, shift, scale, dtype)[0]]
    return [(choice, Candidate(choice.label, run, sets)) for choice, run in choices]


def low_rank(shape: tuple[int, int, int], dtype: str) -> Options:
    """The first factor of a low-rank update at tokens, columns, features."""
    columns = shape[1]
    ready, _ = first_factor.candidates(*shape, dtype)
    settings = {first_factor.label(s): first_factor.blocks(s, columns) for s in first_factor.SETTINGS}
    choices = [(Choice("triton", settings[c.name]), c) for c in ready if c.name in settings]
    return [(choice, Candidate(choice.label, c.run, c.sets)) for choice, c in choices]


def attention(shape: tuple[int, int, int], dtype: str, sound: list[dict[str, Any]]) -> Options:
    """8-bit attention from what a product wrote: plain Triton's, and Hopper's configurations known to be right."""
    from tritflow.profiling.attention import hopper, plain, projected

    given = [projected(shape, seed) for seed in range(3)]
    contenders = [(Choice("triton"), plain(dtype)), *((Choice("hopper", s), hopper(dtype, s)) for s in sound)]

    def candidate(choice: Choice, contender: Any) -> Candidate:
        return Candidate(choice.label, lambda i: contender.whole(*given[i]), len(given))

    return [(choice, candidate(choice, contender)) for choice, contender in contenders]


def targets(part: str, seconds: float, say: Callable[[str], None]) -> list[tuple[str, Callable[[], Options]]]:
    """Entries of a part, each with what makes its options."""
    if part == "few rows":
        return [(tuning.entry(tuning.W2A16, 1, n, k), lambda n=n, k=k: few_rows(n, k)) for n, k in ROWS]  # type: ignore[misc]
    if part == "adaln":
        return [
            (tuning.entry(tuning.adaln(d), m, k, k), lambda m=m, k=k, d=d: adaln(m, k, d))  # type: ignore[misc]
            for m, k in TOKENS
            for d in DTYPES
        ]
    if part == "first factor":
        return [
            (tuning.entry(tuning.low_rank_down(reference.QTYPE[d]), *s), lambda s=s, d=d: low_rank(s, d))  # type: ignore[misc]
            for s in first_factor.SHAPES
            for d in DTYPES
        ]
    from tritflow.profiling.attention import sound_settings

    sound = sound_settings(ATTENTION, say, seconds)
    return [
        (tuning.entry(tuning.attention(d), *ATTENTION), lambda d=d: attention(ATTENTION, d, sound[d]))  # type: ignore[misc]
        for d in DTYPES
    ]


@torch.inference_mode()
def tune_part(
    part: str, keep: Callable[[str, Choice], None], deadline: float, milliseconds: float, say: Callable[[str], None]
) -> dict[str, Any]:
    """Measure a part of `PARTS` and hand the fastest of each entry to `keep`; entry -> label -> microseconds."""
    everything: dict[str, Any] = {}
    for key, make in targets(part, deadline - time.monotonic(), say):
        if time.monotonic() > deadline:
            break
        options = make()
        times = graph_times([candidate for _, candidate in options], rounds=3, milliseconds=milliseconds)
        everything[key] = times
        good = {label: t["p50"] for label, t in times.items() if "p50" in t}
        if not good:
            say(f"{key}: nothing ran: {times}")
            continue
        best = min(good, key=good.__getitem__)
        (choice,) = (choice for choice, _ in options if choice.label == best)
        keep(key, Choice(choice.backend, choice.config, round(good[best], 2)))
        rest = ", ".join(f"{label} {us:.1f}" for label, us in good.items() if label != best)
        say(f"{key}: {best} {good[best]:.1f} us; {rest}")
    return everything
