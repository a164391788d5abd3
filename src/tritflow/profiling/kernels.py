"""Benchmark of the ternary matrix products against the dense rivals of the same GPU, in one run.

``python -m tritflow.profiling.kernels --probe --out DIR`` checks every variant first, each failure kept apart, then
times those that are right. Fair: inputs rotate so that no cache is measured, rivals get Gaussian *and* ternary-valued
weights (tensor cores draw less power on small values), fast accumulation on and off, rounds are interleaved.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.profiling.isolate import Task, run_isolated, serve

SHAPES = [
    (4608, 9216, 3072),
    (4608, 12288, 3072),
    (4608, 3072, 12288),
    (4608, 3072, 15360),
    (4608, 3072, 3072),
    (4096, 3072, 3072),
    (4096, 12288, 3072),
    (4096, 3072, 12288),
    (512, 3072, 3072),
    (512, 12288, 3072),
    (512, 3072, 12288),
]
"""(M, N, K) of FLUX.1-dev at 1024x1024: 4096 image and 512 text tokens, 4608 together; 9216 is fused q, k and v."""
SKINNY_SHAPES = [(1, 18432, 3072), (1, 9216, 3072), (8, 18432, 3072), (50, 18432, 3072)]
CHECK_SHAPES = [
    (1, 128, 128),
    (37, 256, 256),
    (129, 264, 144),
    (300, 384, 1040),
    (512, 3072, 12288),
    (4608, 3072, 3072),
]

_VARIANTS: dict[str, dict[str, Any]] = {
    "whole": {},
    "halve": {"tail": "halve"},
    "halve-g4": {"tail": "halve", "group": 4},
    "halve-l1": {"tail": "halve", "lag": 1},
    "cut": {"tail": "cut"},
    "s1-g4": {"split": 1, "group": 4},
    "n128": {"split": 1, "block_n": 128, "stages": 8, "group": 4, "lag": 2},
    "n128-cut": {"split": 1, "block_n": 128, "stages": 8, "group": 4, "lag": 2, "tail": "cut"},
    "m64": {"block_m": 64, "stages": 8},
    "16-bit": {"stages": 4, "lag": 1},
    "16-bit-halve": {"stages": 4, "lag": 1, "tail": "halve"},
    "16-bit-n128": {"split": 1, "block_n": 128, "stages": 5, "lag": 1},
    "16-bit-cut": {"stages": 4, "lag": 1, "tail": "cut"},
}


@dataclass
class Candidate:
    """Something to time: ``run(i)`` does the product with input set i of ``sets``."""

    name: str
    run: Callable[[int], Any]
    sets: int


def random_trits(n: int, k: int, device: str = "cuda") -> Tensor:
    """int8 [n, k]: a Gaussian rounded by its mean magnitude, as absmean does (about 31 % zeros)."""
    w = torch.randn(n, k, device=device)
    return (w / w.abs().mean()).round_().clamp_(-1, 1).to(torch.int8)


def quantized(m: int, k: int, dtype: torch.dtype, device: str = "cuda") -> tuple[Tensor, Tensor]:
    """Gaussian activations, quantized per token: ([m, k] int8 or e4m3, fp32 scale [m])."""
    x = torch.randn(m, k, device=device)
    if dtype == torch.bfloat16:
        return x.to(dtype), torch.ones(m, device=device)
    top = 127.0 if dtype == torch.int8 else 448.0
    scale = x.abs().amax(1) / top
    y = x / scale[:, None]
    return (y.round_() if dtype == torch.int8 else y).to(dtype), scale


def _pack(trits: Tensor) -> Tensor:
    from tritflow.formats.packing import pack_2bit

    return pack_2bit(trits)


def _dtype(name: str) -> torch.dtype:
    return {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}[name]


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


def _sets(bytes_a_call: int) -> int:
    """Input sets that together are well over twice the last-level cache."""
    return max(2, min(12, math.ceil(160e6 / bytes_a_call)))


def rivals(m: int, n: int, k: int) -> list[Candidate]:
    """Dense products of the same shape: bf16, int8, fp8 (row-wise and tensor-wise scales), and the scratch route."""
    found: list[Candidate] = []
    sets = _sets(m * k + n * k)

    def tensors(make: Callable[[], Tensor], count: int) -> list[Tensor]:
        return [make() for _ in range(count)]

    half = max(2, sets // 2)
    xb = tensors(lambda: torch.randn(m, k, device="cuda", dtype=torch.bfloat16), half)
    wb = tensors(lambda: torch.randn(n, k, device="cuda", dtype=torch.bfloat16), half)
    found.append(Candidate("bf16 gauss", lambda i: torch.nn.functional.linear(xb[i], wb[i]), half))
    trits = tensors(lambda: random_trits(n, k), sets)
    wt = [t.to(torch.bfloat16) for t in trits[:half]]
    found.append(Candidate("bf16 trits", lambda i: torch.nn.functional.linear(xb[i], wt[i]), half))

    qi = [quantized(m, k, torch.int8)[0] for _ in range(sets)]
    wi = [quantized(n, k, torch.int8)[0] for _ in range(sets)]
    if m > 16:
        found.append(Candidate("int_mm gauss", lambda i: torch._int_mm(qi[i], wi[i].t()), sets))
        found.append(Candidate("int_mm trits", lambda i: torch._int_mm(qi[i], trits[i].t()), sets))

    qf = [quantized(m, k, torch.float8_e4m3fn) for _ in range(sets)]
    wf = [quantized(n, k, torch.float8_e4m3fn) for _ in range(sets)]
    tf = [t.to(torch.float8_e4m3fn) for t in trits]
    one = torch.ones((), device="cuda")

    def product(weights: list[Tensor], by_row: bool, fast: bool) -> Callable[[int], Tensor]:
        def run(i: int) -> Tensor:
            x, sx = qf[i]
            scales = (sx[:, None], wf[i][1][None, :]) if by_row else (one, one)
            return torch._scaled_mm(x, weights[i].t(), *scales, out_dtype=torch.bfloat16, use_fast_accum=fast)

        return run

    for kind, weights in (("gauss", [w for w, _ in wf]), ("trits", tf)):
        for fast in (True, False):
            speed = "fast" if fast else "slow"
            found.append(Candidate(f"fp8 row {kind} {speed}", product(weights, True, fast), sets))
            found.append(Candidate(f"fp8 tensor {kind} {speed}", product(weights, False, fast), sets))
    return found


def ours(m: int, n: int, k: int, variants: list[str], activation_dtype: str) -> list[Candidate]:
    """The ternary product in each variant, activations quantized beforehand."""
    from tritflow.kernels.hopper.launch import Config

    sets = _sets(m * k + n * k // 4)
    q = [quantized(m, k, _dtype(activation_dtype)) for _ in range(sets)]
    w = [_pack(random_trits(n, k)) for _ in range(sets)]
    scale = torch.rand(n, device="cuda").to(torch.bfloat16)
    bias = torch.randn(n, device="cuda").to(torch.bfloat16)

    def product(config: Config) -> Callable[[int], Tensor]:
        return lambda i: _hopper(*q[i], w[i], scale, bias, config=config)

    return [Candidate(f"{activation_dtype} {v}", product(Config(**_VARIANTS[v])), sets) for v in variants]


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


def check(variant: str, activation_dtype: str, shapes: list[tuple[int, int, int]]) -> dict[str, Any]:
    """A variant against float64 of the same inputs, outputs poisoned; int8 must be exact, see ``wrong``."""
    from tritflow.kernels.hopper.launch import Config

    config = Config(**_VARIANTS[variant])
    report: dict[str, Any] = {"wrong": 0, "worst": 0.0}
    for m, n, k in shapes:
        q, sx = quantized(m, k, _dtype(activation_dtype))
        trits = random_trits(n, k)
        packed, sw = _pack(trits), torch.rand(n, device="cuda").to(torch.bfloat16)
        bias = torch.randn(n, device="cuda").to(torch.bfloat16)
        exact = q.double() @ trits.double().T
        y = (exact.float() * sx[:, None]).double() * sw.double() + bias.double()
        out = torch.full((m, n), float("nan"), dtype=torch.bfloat16, device="cuda")
        _hopper(q, sx, packed, sw, bias, out=out, config=config)
        torch.cuda.synchronize()
        error = ((out.double() - y).norm() / y.norm()).item()
        report["worst"] = max(report["worst"], error if math.isfinite(error) else math.inf)
        if activation_dtype == "int8":
            wrong = int((out != y.float().to(torch.bfloat16)).sum())
        else:
            wrong = 0 if error < 0.01 else -1
        if wrong:
            report["wrong"] += wrong
            report.setdefault("where", []).append([m, n, k, wrong, error, _pattern(out, y)])
        if m * n * k > 1e9:
            again = torch.empty_like(out)
            for _ in range(100):
                again.fill_(float("nan"))
                _hopper(q, sx, packed, sw, bias, out=again, config=config)
                if not torch.equal(again, out):
                    report["moves"] = report.get("moves", 0) + 1
    return report


def _hopper(q: Tensor, scale: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    from tritflow.kernels.hopper.launch import w2a8_gemm, w2a16_gemm

    return w2a16_gemm(q, *rest, **options) if q.dtype == torch.bfloat16 else w2a8_gemm(q, scale, *rest, **options)


def _compile(variant: str, activation_dtype: str) -> dict[str, Any]:
    """Fill Triton's cache with what `check` and `ours` will launch, launching nothing."""
    from tritflow.kernels.hopper import launch

    kernel = launch.w2a8_kernel
    begin = time.perf_counter()

    class Compiler:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *arguments, **options: kernel.warmup(*arguments, grid=grid, **options)

    launch.w2a8_kernel = Compiler()  # type: ignore[assignment]
    try:
        for m, n, k in [(128, 256, 128), (4608, 3072, 3072)]:
            q, scale = quantized(m, k, _dtype(activation_dtype))
            row = torch.ones(n, device="cuda", dtype=torch.bfloat16)
            weight = torch.zeros(n, k // 4, device="cuda", dtype=torch.uint8)
            _hopper(q, scale, weight, row, row, config=launch.Config(**_VARIANTS[variant]))
    finally:
        launch.w2a8_kernel = kernel
    return {"seconds": time.perf_counter() - begin}


def _check_skinny() -> dict[str, Any]:
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    report: dict[str, Any] = {"worst": 0.0}
    for m, n, k in [(1, 128, 128), (3, 200, 272), (8, 3072, 3072), (1, 18432, 3072)]:
        x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
        trits, sw = random_trits(n, k), torch.rand(n, device="cuda").to(torch.bfloat16)
        y = (x.double() @ trits.double().T) * sw.double()
        error = ((w2a16_skinny(x, _pack(trits), sw).double() - y).norm() / y.norm()).item()
        report[f"{m}x{n}x{k}"] = error
        report["worst"] = max(report["worst"], error if math.isfinite(error) else math.inf)
    report["wrong"] = int(report["worst"] > 0.005)
    return report


_SKINNY = ((64, 1), (64, 2), (64, 4), (64, 8), (128, 2), (128, 4))
"""(bytes of a weight row a warp takes at a time, warps)"""


def _skinny(m: int, n: int, k: int) -> list[Candidate]:
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    sets = max(2, math.ceil(160e6 / (n * k / 4)))
    few = max(2, math.ceil(300e6 / (2 * n * k)))
    x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
    wb = [torch.randn(n, k, device="cuda").to(torch.bfloat16) for _ in range(few)]
    wp = [_pack(random_trits(n, k)) for _ in range(sets)]
    scale = torch.rand(n, device="cuda").to(torch.bfloat16)
    found = [Candidate("bf16 gauss", lambda i: torch.nn.functional.linear(x, wb[i]), few)]

    def product(chunk: int, warps: int) -> Callable[[int], Tensor]:
        return lambda i: w2a16_skinny(x, wp[i], scale, chunk=chunk, warps=warps)

    if m <= 8:
        found += [Candidate(f"skinny {chunk}x{warps}", product(chunk, warps), sets) for chunk, warps in _SKINNY]
    return found


def _attention() -> dict[str, Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (torch.randn(1, 24, 4608, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    times: dict[str, Any] = {}
    for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
        with sdpa_kernel(backend):
            run = Candidate(backend.name, lambda i: torch.nn.functional.scaled_dot_product_attention(q, k, v), 4)
            times |= graph_times([run])
    return {"times": times, "tflop": 4 * 24 * 4608 * 4608 * 128 / 1e12}


def _ceilings() -> dict[str, Any]:
    a = torch.empty(1 << 29, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    x, y = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = graph_times([Candidate("copy", lambda i: b.copy_(a), 2), Candidate("bf16", lambda i: x @ y, 2)])
    return {
        "times": times,
        "copy_tb_s": 2 * a.numel() / times["copy"]["p50"] / 1e6,
        "bf16_tflop_s": 2 * 8192**3 / times["bf16"]["p50"] / 1e6,
    }


def handle(task: Task) -> dict[str, Any]:
    """One task of a probe, in the child process."""
    torch.manual_seed(task.get("seed", 0))
    kind = task["kind"]
    with torch.inference_mode():
        if kind == "environment":
            import importlib.metadata as metadata

            p = torch.cuda.get_device_properties(0)
            return {
                "device": p.name,
                "multiprocessors": p.multi_processor_count,
                "torch": torch.__version__,
                "triton": metadata.version("triton"),
                **_ceilings(),
            }
        if kind == "compile":
            return _compile(task["variant"], task["dtype"])
        if kind == "check":
            return check(task["variant"], task["dtype"], [tuple(s) for s in task["shapes"]])
        if kind == "check-skinny":
            return _check_skinny()
        if kind == "attention":
            return _attention()
        m, n, k = task["shape"]
        if kind == "skinny":
            return {"times": graph_times(_skinny(m, n, k))}
        candidates = rivals(m, n, k)
        for dtype, variants in task["variants"].items():
            candidates += ours(m, n, k, variants, dtype)
        return {"times": graph_times(candidates, rounds=task["rounds"], milliseconds=task["milliseconds"])}


def table(shape: tuple[int, int, int], times: dict[str, Any]) -> str:
    """A shape's candidates, fastest first: microseconds, TFLOP/s, ratio to fp8 row-wise (Gaussian, fast)."""
    m, n, k = shape
    flop = 2.0 * m * n * k
    good = {name: t["p50"] for name, t in times.items() if "p50" in t}
    base = good.get("fp8 row gauss fast") or good.get("bf16 gauss")
    lines = [f"{m}x{n}x{k}"]
    for name, us in sorted(good.items(), key=lambda item: item[1]):
        ratio = f"{base / us:6.3f}" if base else "     -"
        lines.append(f"  {name:24s} {us:8.1f} us {flop / us / 1e6:7.0f} TFLOP/s {ratio}")
    lines += [f"  {name:24s} {t['error']}" for name, t in times.items() if "error" in t]
    return "\n".join(lines)


def probe(out: Path, seconds: float, quick: bool = False) -> None:
    """Check every variant, time those that are right, print tables and write ``out/kernels.json`` as it goes."""
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    records: list[dict[str, Any]] = []
    module = "tritflow.profiling.kernels"
    passed: dict[str, list[str]] = {"int8": [], "fp8": []}

    def note(task: Task, result: dict[str, Any]) -> None:
        records.append({"task": task, "result": result})
        (out / "kernels.json").write_text(json.dumps(records))
        if task["kind"] == "check":
            fine = "error" not in result and not result["wrong"] and not result.get("moves")
            if fine:
                passed[task["dtype"]].append(task["variant"])
            print(
                f"check {task['dtype']} {task['variant']}: {'right' if fine else 'WRONG'} {result}",
                flush=True,
            )
        elif task["kind"] in ("gemm", "skinny") and "times" in result:
            print(table(tuple(task["shape"]), result["times"]), flush=True)
        else:
            print(task["kind"], task.get("shape", ""), json.dumps(result), flush=True)

    fp8 = ["base", "split2", "split2-no-cut", "n128", "m64"]
    checks: list[Task] = [{"kind": "environment"}]
    checks += [{"kind": "check", "variant": v, "dtype": "int8", "shapes": CHECK_SHAPES} for v in _VARIANTS]
    checks += [{"kind": "check", "variant": v, "dtype": "fp8", "shapes": CHECK_SHAPES} for v in fp8]
    checks += [{"kind": "check-skinny"}]
    run_isolated(module, checks, silence=30, deadline=deadline, on_result=note)
    few = [v for v in ("base", "split2", "split2-no-cut", "n128", "n128-no-cut", "m64-split2") if v in passed["int8"]]
    timed: list[Task] = []
    for i, shape in enumerate(SHAPES[:2] if quick else SHAPES):
        variants = {"int8": passed["int8"] if i in (0, 2, 4, 9) else few, "fp8": passed["fp8"]}
        timed.append({"kind": "gemm", "shape": shape, "variants": variants, "rounds": 3, "milliseconds": 30.0})
    timed += [{"kind": "skinny", "shape": shape} for shape in SKINNY_SHAPES]
    timed += [{"kind": "attention"}]
    # What matters most comes first, should the time run out.
    run_isolated(module, timed, silence=60, deadline=deadline, on_result=note)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tritflow.profiling.kernels", description=__doc__)
    parser.add_argument("--probe", action="store_true", help="check and time every variant")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--out", type=Path, default=Path("kernel-probe"), help="folder for kernels.json")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after this long")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker, handle)
    elif options.probe:
        if not torch.cuda.is_available():
            raise SystemExit("the probe needs a CUDA device, and this machine shows none")
        probe(options.out, options.seconds, options.quick)
    else:
        parser.print_help()


if __name__ == "__main__":
    main(sys.argv[1:])
