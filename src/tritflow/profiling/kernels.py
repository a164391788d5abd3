"""Benchmark of the ternary matrix products against the dense rivals of the same GPU, in one run.

``python -m tritflow.profiling.kernels --probe --out DIR`` compiles and checks every variant first, each failure kept
apart, then times those that are right: see `products` for what is timed and `timing` for how.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from tritflow import results
from tritflow.profiling import first_factor, gemlite_rival, passes
from tritflow.profiling.isolate import Task, run_isolated, serve
from tritflow.profiling.product_checks import check, check_skinny, compile_backends, compile_variant
from tritflow.profiling.products import BACKENDS, SKINNY, VARIANTS, ours, rivals, rivals_16bit, skinny
from tritflow.profiling.timing import Candidate, graph_times, paired_times

SHAPES = [
    (4608, 9216, 3072),
    (4608, 12288, 3072),
    (4608, 3072, 12288),
    (4608, 3072, 15360),
    (4608, 3072, 3072),
    (512, 12288, 3072),
    (512, 3072, 12288),
    (512, 3072, 3072),
    (4096, 3072, 3072),
    (4096, 9216, 3072),
    (4096, 12288, 3072),
    (4096, 3072, 12288),
    (512, 9216, 3072),
]
"""(M, N, K) of FLUX.1-dev at 1024x1024: 4096 image and 512 text tokens, 4608 together; 9216 is fused q, k and v."""
DOUBLE_BLOCK = [(m, n, k) for n, k in ((9216, 3072), (3072, 3072), (12288, 3072), (3072, 12288)) for m in (4096, 512)]
"""The eight products of a double block, image and text."""
MAIN_SHAPES = SHAPES[:4]
"""Those that hold nearly all of a step's operations."""
SKINNY_SHAPES = [(1, 18432, 3072), (1, 9216, 3072), (8, 18432, 3072), (50, 18432, 3072), (100, 18432, 3072)]
CHECK_SHAPES = [
    (1, 128, 128),
    (37, 264, 256),
    (300, 384, 1040),
    (512, 12288, 3072),
    (512, 3072, 12288),
    (4608, 3072, 3072),
    (4608, 12288, 3072),
]
_KINDS = {
    "int8": [v for v in VARIANTS if not v.startswith("16-bit")],
    "fp8": ["wide", "narrow", "192 x 192"],
    "bf16": [v for v in VARIANTS if v.startswith("16-bit")],
}
RIVAL = "fp8 row gauss fast"
"""What ratios are to: dense e4m3, a scale a row and a token, Gaussian weights, fast accumulation."""


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


def _sixteen_bits(m: int, n: int, k: int, variants: list[str]) -> dict[str, Any]:
    """16-bit products alone: in turn as elsewhere, and ours block behind block with the dense one ("paired")."""
    dense = rivals_16bit(m, n, k)
    ternary = ours(m, n, k, ["hopper", *(v for v in variants if v != "hopper")], "bf16", BACKENDS)
    times = graph_times([*dense, *ternary], rounds=3, milliseconds=12.0)
    good = [c for c in ternary if "p50" in times[c.name]]
    return {"times": times, "paired": {c.name: paired_times(c, dense[0]) for c in good}}


def handle(task: Task) -> dict[str, Any]:
    """One task of a probe, in the child process."""
    torch.manual_seed(task.get("seed", 0))
    kind = task["kind"]
    with torch.inference_mode():
        if kind == "ceilings":
            return _ceilings()
        if kind == "compile":
            return compile_variant(task["variant"], task["dtype"])
        if kind == "compile backends":
            return compile_backends(task["dtype"], task["k"])
        if kind == "check":
            return check(task["variant"], task["dtype"], [tuple(s) for s in task["shapes"]])
        if kind == "check skinny":
            return check_skinny(SKINNY[task["variant"]])
        if kind == "passes":
            return passes.measure(*task["shape"])
        if kind == "first factor":
            return first_factor.measure(*task["shape"])
        m, n, k = task["shape"]
        if kind == "16 bits":
            return _sixteen_bits(m, n, k, task["variants"])
        if kind == "skinny":
            return {"times": graph_times(skinny(m, n, k))}
        if kind == "compile gemlite":
            return gemlite_rival.warm(m, n, k, task["dtype"])
        if kind == "gemlite":
            found, error = gemlite_rival.candidates(m, n, k, task["dtype"])
            return {"gemlite_error": error, "times": graph_times(found)}
        candidates = rivals(m, n, k)
        for dtype, variants in task["variants"].items():
            candidates += ours(m, n, k, variants, dtype, BACKENDS)
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


class _Account:
    """What a probe found so far: printed as it comes, written to a file, read by the next step."""

    def __init__(self, out: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self.passed: dict[str, list[str]] = {kind: [] for kind in _KINDS}
        self._file = out / "kernels.json"
        self._lock = threading.Lock()

    def __call__(self, task: Task, result: dict[str, Any]) -> None:
        with self._lock:
            self.records.append({"task": task, "result": result})
            self._file.write_text(json.dumps(self.records))
            self._say(task, result)

    def _say(self, task: Task, result: dict[str, Any]) -> None:
        if task["kind"] == "check":
            fine = "error" not in result and not result["wrong"] and not result.get("moves")
            if fine:
                self.passed[task["dtype"]].append(task["variant"])
            word = "right" if fine else "WRONG"
            print(f"check {task['dtype']} {task['variant']}: {word} {json.dumps(result)[:600]}", flush=True)
        elif task["kind"] in ("gemm", "skinny", "gemlite", "16 bits") and "times" in result:
            print(table(tuple(task["shape"]), result["times"]), flush=True)
            for name, found in result.get("paired", {}).items():
                print(f"  {name:24s} paired {found['ratio']['p50']:.3f} of dense bf16's speed", flush=True)
        elif not task["kind"].startswith("compile") or "error" in result:
            print(json.dumps(task), json.dumps(result)[:600], flush=True)


PARTS = ("passes", "few rows", "first factor", "16-bit products", "products", "gemlite")
"""Of a run. `products` has the 16-bit ones among the others; `16-bit products` has them alone."""
DEFAULT_PARTS = tuple(part for part in PARTS if part != "16-bit products")


def probe(
    out: Path, seconds: float, quick: bool = False, parts: tuple[str, ...] = DEFAULT_PARTS
) -> list[dict[str, Any]]:
    """Check every variant, time those that are right, print tables and write ``out/kernels.json`` as it goes.

    Returns what the file holds: {"task": ..., "result": ...} in the order in which they were done.
    """
    out.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    deadline = begin + seconds
    module = "tritflow.profiling.kernels"
    note = _Account(out)
    shapes = SHAPES[:2] if quick else SHAPES
    gemlite = "gemlite" in parts and gemlite_rival.installed()
    rows = [(m, n, k) for m, n, k in SKINNY_SHAPES if m == 1]

    compiles: list[Task] = []
    kinds = _KINDS if "products" in parts else {"bf16": _KINDS["bf16"]} if "16-bit products" in parts else {}
    if kinds:
        # Of what "hopper" chooses nearly all is among the variants.
        compiles += [{"kind": "compile", "variant": v, "dtype": kind} for kind, vs in kinds.items() for v in vs]
        compiles += [
            {"kind": "compile backends", "dtype": kind, "k": k}
            for k in sorted({k for *_, k in shapes})
            for kind in kinds
        ]
    if "few rows" in parts:
        compiles += [{"kind": "check skinny", "variant": v} for v in SKINNY]
    if gemlite:
        # It compiles anew for each K and kind of activations, and differently for one row.
        tried = [min(shape for shape in shapes if shape[2] == k) for k in sorted({k for *_, k in shapes})]
        compiles[:0] = [
            {"kind": "compile gemlite", "dtype": kind, "shape": shape}
            for shape in [*tried, rows[0]]
            for kind in gemlite_rival.KINDS
            if kind == "bf16" or shape[0] > 1
        ]
    workers = max(1, min(14, (os.cpu_count() or 2) - 2))
    threads = [
        threading.Thread(
            target=run_isolated,
            args=(module, compiles[i::workers]),
            kwargs={"silence": 120 if gemlite else 60, "deadline": deadline, "on_result": note},
        )
        for i in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)

    checks: list[Task] = [{"kind": "ceilings"}]
    checks += [
        {"kind": "check", "variant": v, "dtype": kind, "shapes": CHECK_SHAPES}
        for kind, vs in kinds.items()
        for v in ["hopper", *vs]
    ]
    run_isolated(module, checks, silence=30, deadline=deadline, on_result=note)
    # What matters most comes first, should the time run out.
    timed: list[Task] = []
    if "products" in parts:
        timed += [
            {"kind": "gemm", "shape": shape, "variants": note.passed, "rounds": 3, "milliseconds": 12.0}
            for shape in shapes
        ]
    if "few rows" in parts:
        timed[4:4] = [{"kind": "skinny", "shape": shape} for shape in SKINNY_SHAPES]
    if "16-bit products" in parts:
        timed += [{"kind": "16 bits", "shape": shape, "variants": note.passed["bf16"]} for shape in shapes]
    if "first factor" in parts:
        timed[4:4] = [{"kind": "first factor", "shape": shape} for shape in first_factor.SHAPES]
    if "passes" in parts:
        timed[4:4] = [{"kind": "passes", "shape": shape} for shape in passes.SHAPES]
    if gemlite:
        timed += [{"kind": "gemlite", "dtype": "bf16", "shape": shape} for shape in rows]
        timed += [
            {"kind": "gemlite", "dtype": kind, "shape": shape} for shape in shapes for kind in gemlite_rival.KINDS
        ]
    run_isolated(module, timed, silence=60, deadline=deadline, on_result=note)
    return note.records


def summarize(records: list[dict[str, Any]]) -> dict[str, Any]:
    """A probe's account as a run of results: checks, microseconds by shape, and ratios to the rivals.

    A ratio is the rival's median over ours, so above 1 is faster. "means" are geometric means over `MAIN_SHAPES`.
    """
    run: dict[str, Any] = {name: {} for name in ("checks", "products", "few_rows", "passes", "gemlite")}
    run |= {"first_factor": {}, "sixteen_bits": {}}
    for record in records:
        task, result = record["task"], record["result"]
        if task["kind"] == "ceilings":
            run["ceilings"] = result
        elif task["kind"] == "check":
            run["checks"][f"{task['dtype']} {task['variant']}"] = result
        elif task["kind"] == "check skinny":
            run["checks"][f"few rows, {task['variant']}"] = result
        elif task["kind"] in ("passes", "first factor", "16 bits"):
            part = {"16 bits": "sixteen_bits"}.get(task["kind"], task["kind"].replace(" ", "_"))
            run[part]["x".join(map(str, task["shape"]))] = result
        elif task["kind"] == "gemlite":
            run["gemlite"][f"{task['dtype']} " + "x".join(map(str, task["shape"]))] = _against_gemlite(result)
        elif task["kind"] in ("gemm", "skinny"):
            where = run["products" if task["kind"] == "gemm" else "few_rows"]
            where["x".join(map(str, task["shape"]))] = _entry(task["kind"], result)
    main = [run["products"].get("x".join(map(str, shape)), {}).get("ratios", {}) for shape in MAIN_SHAPES]
    names = set.intersection(*(set(ratios) for ratios in main))
    run["means"] = {name: math.exp(sum(math.log(r[name]) for r in main) / len(main)) for name in sorted(names)}
    run["double_block"] = _double_block(run["products"])
    return run


def _double_block(products: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The eight products of a double block one after another: microseconds of the dense library and of ours."""
    times = [products.get("x".join(map(str, shape)), {}).get("microseconds", {}) for shape in DOUBLE_BLOCK]
    found = {}
    for kind in ("int8", "fp8"):
        pairs = [(t.get(RIVAL, {}).get("p50"), t.get(f"{kind} hopper", {}).get("p50")) for t in times]
        if all(dense and ternary for dense, ternary in pairs):
            dense, ternary = (sum(column) for column in zip(*pairs, strict=True))
            found[kind] = {"dense": dense, "ternary": ternary, "ratio": dense / ternary}
    return found


def _against_gemlite(result: dict[str, Any]) -> dict[str, Any]:
    us = {name.split()[-1]: t["p50"] for name, t in result.get("times", {}).items() if "p50" in t}
    return {**result, **us, "speedup": us["gemlite"] / us["tritflow"]} if len(us) == 2 else result


def _entry(kind: str, result: dict[str, Any]) -> dict[str, Any]:
    times = result.get("times", {})
    entry: dict[str, Any] = {"microseconds": times}
    if "error" in result:
        entry["error"] = result["error"]
    us = {name: t["p50"] for name, t in times.items() if "p50" in t}
    pairs = {
        "int8 / fp8 row": (RIVAL, "int8 hopper"),
        "int8 / fp8 row, trits": ("fp8 row trits fast", "int8 hopper"),
        "int8 / bf16": ("bf16 gauss", "int8 hopper"),
        "int8 / int_mm": ("int_mm gauss", "int8 hopper"),
        "fp8 / fp8 row": (RIVAL, "fp8 hopper"),
        "fp8 / fp8 row, trits": ("fp8 row trits fast", "fp8 hopper"),
        "w2a16 / bf16": ("bf16 gauss", "bf16 hopper"),
        "int8 with quantization / fp8 row with quantization": (
            "fp8 row gauss fast + quantize",
            "int8 hopper + quantize",
        ),
    }
    if kind == "skinny":
        pairs = _few_rows(us, entry)
    entry["ratios"] = {name: us[a] / us[b] for name, (a, b) in pairs.items() if a in us and b in us}
    return entry


def _few_rows(us: dict[str, float], entry: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Notes the fastest product in an entry, and the limits and what share of their speed it has; what to compare."""
    fastest = min(
        (name for name in us if name != "bf16 gauss" and not name.startswith("limit, ")),
        key=us.__getitem__,
        default="",
    )
    entry["fastest"] = fastest
    limits: dict[str, float] = {}
    for name, time_ in us.items():
        if name.startswith("limit, "):
            kind = name.split(", ")[1]
            limits[kind] = min(time_, limits.get(kind, math.inf))
    if fastest and "read" in limits:
        entry["limits"] = {**limits, "fastest": us[fastest], "share": limits["read"] / us[fastest]}
    return {"w2a16 / bf16": ("bf16 gauss", fastest)}


def bench_gpu(
    device: str, seconds: float, quick: bool, note: str, out: Path, parts: tuple[str, ...] = DEFAULT_PARTS
) -> dict[str, Any]:
    """A probe as a run for `tritflow.results`, with where it came from."""
    # Results hold no NaN and no infinity; what could not be formed is null.
    text = json.dumps(summarize(probe(out, seconds, quick, parts)))
    return {
        **results.provenance(device),
        "quick": quick,
        "parts": list(parts),
        "note": note,
        **json.loads(text, parse_constant=lambda _: None),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tritflow.profiling.kernels", description=__doc__)
    parser.add_argument("--probe", action="store_true", help="check and time every variant")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    parser.add_argument("--part", action="append", choices=PARTS, help="of the run; may be repeated (all but one)")
    parser.add_argument("--out", type=Path, default=Path("kernel-probe"), help="folder for kernels.json")
    parser.add_argument("--results", type=Path, help="append the run to this folder of results")
    parser.add_argument("--note", default="", help="kept with the result")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop after this long")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker, handle)
    elif options.probe:
        if not torch.cuda.is_available():
            raise SystemExit("the probe needs a CUDA device, and this machine shows none")
        run = bench_gpu(
            "cuda", options.seconds, options.quick, options.note, options.out, tuple(options.part or DEFAULT_PARTS)
        )
        print(json.dumps(run["means"], indent=1))
        if options.results is not None:
            results.append(results.path_for(options.results, "kernels-cuda", run["device"]), "kernels-cuda", run)
    else:
        parser.print_help()


if __name__ == "__main__":
    main(sys.argv[1:])
