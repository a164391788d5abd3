"""Find the fastest backend and tiles of each ternary product on this GPU, and write them where kernels look them up."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow import results
from tritflow.kernels import BackendError, reference, tuning, w2a8_matmul, w2a16_linear
from tritflow.kernels.hopper import why_not as hopper_why_not
from tritflow.kernels.tuning import Choice
from tritflow.profiling import tune_passes
from tritflow.profiling.isolate import Task, run_side_by_side, serve
from tritflow.profiling.products import quantized, random_trits
from tritflow.profiling.timing import Candidate, graph_times

PRODUCTS = [(3072, 3072), (9216, 3072), (12288, 3072), (3072, 12288), (3072, 15360)]
"""(N, K) of FLUX.1-dev's blocks; 9216 is query, key and value as one."""
TOKENS = (4608, 4096, 512)
NAMES = ("w2a8 float8_e4m3fn", "w2a8 int8", tuning.W2A16)
BACKENDS = ("triton", "scratch", "hopper")
TILES = [
    (128, 128, 8, 3),
    (128, 128, 4, 3),
    (128, 128, 4, 4),
    (64, 256, 8, 4),
    (64, 256, 4, 3),
    (128, 64, 4, 4),
    (128, 256, 8, 3),
]
"""(BLOCK_M, BLOCK_N, warps, stages) that the plain Triton product is tried with.

Packed weights are a quarter of the bytes of activations, so tiles of many weight rows read least; two blocks on a
multiprocessor (at most 128 registers a thread with 8 warps, 255 with 4) decode and multiply in turn.
"""
HOPPER: list[dict[str, Any]] = [
    {},
    {"lag": 1},
    {"group": 4},
    {"split": 1, "group": 4},
    {"split": 1, "block_n": 128, "stages": 8, "group": 4, "lag": 2},
    {"split": 1, "block_n": 128, "stages": 8, "group": 8, "lag": 2},
    {"split": 1, "block_m": 64, "stages": 8},
    {"consumers": 3, "block_m": 192, "block_n": 192, "stages": 5, "lag": 1},
    {"consumers": 3, "block_m": 192, "block_n": 192, "stages": 5, "lag": 0, "group": 4},
    {"consumers": 3, "block_m": 128, "block_n": 192, "stages": 7, "lag": 1},
    {"consumers": 4, "block_m": 128, "block_n": 256, "stages": 6, "lag": 1},
    {"consumers": 2, "block_m": 192, "block_n": 128, "stages": 6, "lag": 1},
    {"consumers": 2, "block_m": 128, "block_n": 128, "stages": 8, "lag": 1, "group": 4},
    {"consumers": 3, "block_m": 64, "block_n": 192, "stages": 8, "lag": 1},
    {"consumers": 4, "block_m": 64, "block_n": 256, "stages": 8, "lag": 0},
]
HOPPER_16: list[dict[str, Any]] = [
    {"stages": 4, "lag": 1},
    {"stages": 4, "lag": 2, "group": 4},
    {"split": 1, "block_n": 128, "stages": 5, "group": 4, "lag": 1},
    {"consumers": 3, "block_m": 128, "block_n": 192, "stages": 4, "lag": 1},
    {"consumers": 2, "block_m": 192, "block_n": 128, "stages": 3, "lag": 1},
    {"consumers": 2, "block_m": 128, "block_n": 128, "stages": 5, "lag": 1, "group": 4},
    {"consumers": 3, "block_m": 64, "block_n": 192, "stages": 7, "lag": 1},
]
"""Configurations of the Hopper product that won somewhere; see `hopper.launch.Config`."""

PARTS = (*tune_passes.PARTS, "products")
"""In this order; the first ones are short."""
Say = Callable[[str], None]


def choices(name: str, backends: tuple[str, ...]) -> Iterator[Choice]:
    """What is tried for a product."""
    if "scratch" in backends:
        yield Choice("scratch")
    if "triton" in backends:
        for block_m, block_n, warps, stages in TILES:
            if name != tuning.W2A16 or block_m * block_n <= 128 * 128:
                tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}
                yield Choice("triton", tiles)
    if "hopper" in backends:
        for config in HOPPER_16 if name == tuning.W2A16 else HOPPER:
            yield Choice("hopper", dict(config))


def runner(choice: Choice) -> Callable[..., Tensor]:
    """The product as a choice computes it, for activations that are quantized already or 16-bit ones."""
    if choice.backend == "triton":
        from tritflow.kernels.triton.gemm import w2a8_gemm, w2a16_gemm

        def tiled(x: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
            if scale is None:
                return w2a16_gemm(x, weight, weight_scale, bias, None, blocks=choice.config)
            return w2a8_gemm(x, scale, weight, weight_scale, bias, torch.bfloat16, blocks=choice.config)

        return tiled
    if choice.backend == "hopper":
        from tritflow.kernels.hopper import launch

        config = launch.Config(**choice.config)

        def hopper(x: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
            if scale is None:
                return launch.w2a16_gemm(x, weight, weight_scale, bias, config=config)
            return launch.w2a8_gemm(x, scale, weight, weight_scale, bias, config=config)

        return hopper

    def named(x: Tensor, scale: Tensor | None, weight: Tensor, weight_scale: Tensor, bias: Tensor) -> Tensor:
        if scale is None:
            return w2a16_linear(x, weight, weight_scale, bias, backend=choice.backend)
        return w2a8_matmul(x, scale, weight, weight_scale, torch.bfloat16, bias, backend=choice.backend)

    return named


def _inputs(name: str, m: int, n: int, k: int) -> list[tuple[Any, ...]]:
    """Input sets, together over twice the last-level cache."""
    from tritflow.formats.packing import pack_2bit

    sets = max(2, min(8, math.ceil(160e6 / (m * k + n * k / 4))))
    found: list[tuple[Any, ...]] = []
    for _ in range(sets):
        if name == tuning.W2A16:
            x, scale = torch.randn(m, k, device="cuda").bfloat16(), None
        else:
            x, scale = quantized(m, k, reference.QTYPE[name.removeprefix("w2a8 ")])
        row, bias = torch.rand(n, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()
        found.append((x, scale, pack_2bit(random_trits(n, k)), row, bias))
    return found


def _expected(x: Tensor, scale: Tensor | None, weight: Tensor, row: Tensor, bias: Tensor) -> Tensor:
    if scale is None:
        return reference.w2a16_linear(x, weight, row, bias)
    return reference.w2a8_matmul(x, scale, weight, row, torch.float32, bias)


@torch.inference_mode()
def handle(task: Task) -> dict[str, Any]:
    """A worker's task: compile a choice and run it once on a small product."""
    inputs = _inputs(task["name"], 256, 384, 512)[0]
    run = runner(Choice(task["backend"], task["config"]))
    error = ((run(*inputs).float() - _expected(*inputs)).norm() / _expected(*inputs).norm()).item()
    return {} if error < 0.01 else {"error": f"wrong: relative error {error:.3g}"}


def precompile(names: tuple[str, ...], backends: tuple[str, ...], deadline: float) -> dict[str, dict[str, str]]:
    """Compile all choices, many at a time, each in a process that may crash or hang: name -> label -> error."""
    tasks: list[Task] = [
        {"name": name, "backend": choice.backend, "config": choice.config}
        for name in names
        for choice in choices(name, backends)
    ]
    errors: dict[str, dict[str, str]] = {name: {} for name in names}

    def note(task: Task, result: dict[str, Any]) -> None:
        if "error" in result:
            errors[task["name"]][Choice(task["backend"], task["config"]).label] = result["error"]

    run_side_by_side("tritflow.profiling.tune", tasks, silence=60.0, deadline=deadline, on_result=note)
    return errors


@torch.inference_mode()
def tune_product(
    name: str, m: int, n: int, k: int, backends: tuple[str, ...], milliseconds: float, broken: dict[str, str]
) -> dict[str, Any]:
    """Times of every choice that computes the right thing: label -> choice and microseconds, or an error.

    `broken`: label -> error of those that are not to be tried.
    """
    inputs = _inputs(name, m, n, k)
    truth = _expected(*inputs[0])
    found: dict[str, Any] = {label: {"error": error} for label, error in broken.items()}
    ready: dict[str, tuple[Choice, Candidate]] = {}
    for choice in choices(name, backends):
        if choice.label in broken:
            continue
        try:
            run = runner(choice)
            error = ((run(*inputs[0]).float() - truth).norm() / truth.norm()).item()
            if not error < 0.01:
                found[choice.label] = {"error": f"wrong: relative error {error:.3g}"}
                continue
        except (BackendError, RuntimeError, ValueError) as problem:
            if "CUDA error" in str(problem):
                raise
            found[choice.label] = {"error": str(problem).splitlines()[0][:160]}
            continue
        ready[choice.label] = (
            choice,
            Candidate(choice.label, lambda i, run=run: run(*inputs[i]), len(inputs)),  # type: ignore[misc]
        )
    times = graph_times([candidate for _, candidate in ready.values()], rounds=2, milliseconds=milliseconds)
    for label, (choice, _) in ready.items():
        found[label] = {"choice": choice, **times[label]}
    return found


def tune(
    path: Path | None = None,
    *,
    names: tuple[str, ...] = NAMES,
    backends: tuple[str, ...] = BACKENDS,
    tokens: tuple[int, ...] = TOKENS,
    parts: tuple[str, ...] = PARTS,
    seconds: float = 240.0,
    milliseconds: float = 12.0,
    say: Say = print,
) -> dict[str, Any]:
    """Measure FLUX.1-dev's products and write the fastest choices; the file is complete after each product.

    Args:
        path: of the file; by default this GPU's in the user's cache folder.
        names: products.
        backends: that are tried; hopper only on such a GPU.
        tokens: sizes.
        parts: of `PARTS`, what is measured.
        seconds: after which nothing new is started.
        milliseconds: of measurement a choice and round.
        say: told each product's result in a line.

    Returns:
        Every measurement: entry -> label -> microseconds at p20, p50 and p80, or an error.
    """
    if hopper_why_not() is not None:
        backends = tuple(name for name in backends if name != "hopper")
    device = torch.cuda.get_device_name()
    target = path or tuning.cache_folder() / f"{tuning.slug(device)}.json"
    versions = results.provenance("cuda")["versions"]
    kept = {key: versions[key] for key in ("torch", "triton", "tritflow") if key in versions}
    deadline = time.monotonic() + seconds
    everything: dict[str, Any] = {}

    def keep(key: str, choice: Choice) -> None:
        tuning.write(target, device, kept, {key: choice})

    for part in parts:
        if part != "products" and time.monotonic() < deadline:
            everything |= tune_passes.tune_part(part, keep, deadline, milliseconds, say)
    if "products" not in parts:
        return everything
    broken = precompile(names, backends, deadline)
    for name, errors in broken.items():
        for label, error in errors.items():
            say(f"{name}: {label} is left out: {error}")
    for m in tokens:
        for name in names:
            for n, k in PRODUCTS:
                if time.monotonic() > deadline:
                    return everything
                found = tune_product(name, m, n, k, backends, milliseconds, broken[name])
                key = tuning.entry(name, m, n, k)
                everything[key] = {
                    label: {x: y for x, y in result.items() if x != "choice"} for label, result in found.items()
                }
                good = {label: result for label, result in found.items() if "p50" in result}
                if good:
                    best = min(good, key=lambda label: good[label]["p50"])
                    us = good[best]["p50"]
                    choice = good[best]["choice"]
                    keep(key, Choice(choice.backend, choice.config, round(us, 2)))
                    rest = ", ".join(f"{label} {r['p50']:.0f}" for label, r in good.items() if label != best)
                    say(f"{key}: {best} {us:.1f} us ({2e-6 * m * n * k / us:.0f} TFLOP/s); {rest}")
                else:
                    say(f"{key}: nothing ran: {json.dumps(everything[key])}")
    return everything


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tritflow.profiling.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="file of choices (default: the user's cache folder)")
    parser.add_argument("--times", type=Path, help="also write every measurement here, as JSON")
    parser.add_argument("--seconds", type=float, default=240.0, help="start nothing new after this long")
    parser.add_argument("--backend", action="append", help="triton, scratch, hopper; may be repeated (all)")
    parser.add_argument("--name", action="append", help="'w2a8 int8', 'w2a8 float8_e4m3fn', w2a16; may be repeated")
    parser.add_argument("--tokens", action="append", type=int, help="may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS, help="may be repeated (all)")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker, handle)
        return
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a CUDA device, and this machine shows none")
    times = tune(
        options.out,
        names=tuple(options.name or NAMES),
        backends=tuple(options.backend or BACKENDS),
        tokens=tuple(options.tokens or TOKENS),
        parts=tuple(options.part or PARTS),
        seconds=options.seconds,
        say=lambda text: print(text, flush=True),
    )
    if options.times is not None:
        results.write_atomically(options.times, json.dumps(times, indent=1).encode())


if __name__ == "__main__":
    main(sys.argv[1:])
