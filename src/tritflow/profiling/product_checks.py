"""Whether the Hopper products compute the right thing, and compiling them beforehand."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritflow.profiling.products import VARIANTS, activation_dtype, hopper, pack, quantized, random_trits

REPEATS = 30
"""Launches that must give the same bits, for products of over 1e9 operations."""


def _pattern(out: Tensor, y: Tensor) -> dict[str, Any]:
    """Where an output is wrong: share of bad elements by 64 weight rows and by 32 tokens of a tile, and NaNs."""
    bad = ((out.double() - y).abs() > 0.02 * y.abs() + 0.02 * y.std()) | out.isnan()
    rows = torch.stack(
        [bad[:, torch.arange(bad.shape[1], device=bad.device) // 64 % 4 == i].float().mean() for i in range(4)]
    )
    tokens = torch.stack(
        [bad[torch.arange(bad.shape[0], device=bad.device) // 32 % 4 == i].float().mean() for i in range(4)]
    )
    corner = (out[:2, :6].double() / y[:2, :6]).flatten()
    return {
        "by_rows": [round(v, 4) for v in rows.tolist()],
        "by_tokens": [round(v, 4) for v in tokens.tolist()],
        "nan": int(out.isnan().sum()),
        "ratio": [round(v, 3) for v in corner.tolist()],
    }


def check(variant: str, kind: str, shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """A variant against float64 of the same inputs, outputs poisoned.

    Returns "wrong": elements of int8 that are not exact, or a negative number for a relative error over 1 % or over
    1.5 times the dense library's; "worst": the largest relative error; "over_dense": the largest ratio to the dense
    library's error (fp8); "moves": repetitions that gave other bits, if any did; "where": what was wrong.
    """
    from tritflow.kernels.hopper.launch import Config

    config = None if variant == "hopper" else Config(**VARIANTS[variant])
    report: dict[str, Any] = {"wrong": 0, "worst": 0.0}
    for m, n, k in shapes:
        q, sx = quantized(m, k, activation_dtype(kind))
        trits = random_trits(n, k)
        packed, sw = pack(trits), torch.rand(n, device="cuda").to(torch.bfloat16)
        bias = torch.randn(n, device="cuda").to(torch.bfloat16)
        exact = q.double() @ trits.double().T
        y = (exact.float() * sx[:, None]).double() * sw.double() + bias.double()
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        hopper(q, sx, packed, sw, bias, out=out, config=config)
        torch.cuda.synchronize()
        error = ((out.double() - y).norm() / y.norm()).item()
        report["worst"] = max(report["worst"], error if math.isfinite(error) else math.inf)
        if kind == "int8":
            wrong = int((out != y.float().to(torch.bfloat16)).sum())
        else:
            wrong = 0 if error < 0.01 else -1
        if kind == "fp8" and n % 16 == 0:
            # The library's product of the same inputs, ternary weights as e4m3, fast accumulation as ours.
            dense = torch._scaled_mm(
                q,
                trits.to(q.dtype).t(),
                sx[:, None],
                sw.float()[None],
                bias,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            report["over_dense"] = max(
                report.get("over_dense", 0.0), error / ((dense.double() - y).norm() / y.norm()).item()
            )
            wrong = wrong or -int(report["over_dense"] > 1.5)
        if wrong:
            report["wrong"] += wrong
            report.setdefault("where", []).append([m, n, k, wrong, error, _pattern(out, y)])
        if m * n * k > 1e9:
            again = torch.empty_like(out)
            for _ in range(REPEATS):
                again.fill_(float("nan"))
                hopper(q, sx, packed, sw, bias, out=again, config=config)
                if not torch.equal(again, out):
                    report["moves"] = report.get("moves", 0) + 1
    return report


def compile_variant(variant: str, kind: str) -> dict[str, Any]:
    """Fill Triton's cache with what `check` and `ours` will launch, launching nothing."""
    from tritflow.kernels.hopper import launch

    config = None if variant == "hopper" else launch.Config(**VARIANTS[variant])
    kernels = {name: getattr(launch, name) for name in ("w2a8_kernel", "consumers_kernel")}
    begin = time.perf_counter()

    class Compiler:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *arguments, **options: self.kernel.warmup(*arguments, grid=grid, **options)

    for name, kernel in kernels.items():
        setattr(launch, name, Compiler(kernel))
    try:
        for m, n, k in [(128, 256, 128), (4608, 3072, 3072)]:
            q, scale = quantized(m, k, activation_dtype(kind))
            row = torch.ones(n, device="cuda", dtype=torch.bfloat16)
            weight = torch.zeros(n, k // 4, device="cuda", dtype=torch.uint8)
            hopper(q, scale, weight, row, row, config=config)
    finally:
        for name, kernel in kernels.items():
            setattr(launch, name, kernel)
    return {"seconds": time.perf_counter() - begin}


def check_skinny(settings: dict[str, Any]) -> dict[str, Any]:
    """A setting of the product with few rows against float64."""
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    report: dict[str, Any] = {"worst": 0.0}
    shapes = [(3, 200, 272), (8, 3072, 3072), (1, 18432, 3072), (1, 9216, 3072), (5, 264, 1040), (1, 200, 1280)]
    for m, n, k in shapes:
        x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
        trits, sw = random_trits(n, k), torch.rand(n, device="cuda").to(torch.bfloat16)
        y = (x.double() @ trits.double().T) * sw.double()
        out = w2a16_skinny(x, pack(trits), sw, **settings)
        error = ((out.double() - y).norm() / y.norm()).item()
        report["worst"] = max(report["worst"], error if math.isfinite(error) else math.inf)
    report["wrong"] = int(report["worst"] > 0.005)
    return report


def compile_backends(kind: str, k: int) -> dict[str, Any]:
    """Compile what `products.BACKENDS` run for a K, by a small product."""
    from tritflow.profiling.products import BACKENDS, ours

    begin = time.perf_counter()
    for candidate in ours(128, 256, k, [], kind, BACKENDS):
        candidate.run(0)
    torch.cuda.synchronize()
    return {"seconds": time.perf_counter() - begin}
