"""One sampler step of FLUX.1-dev's transformer on a GPU: dense bf16 and fp8, ternary as stock and optimized.

Random weights of the real config stand in for the checkpoint (`pipelines.synthetic`). Every contender is built,
measured and freed by itself in a child process that may crash; its result is written before the next one starts.
All run PyTorch's attention, restricted to the one kernel that is fastest on this GPU.

``python -m tritflow.profiling.transformer --out DIR`` is what ``tritflow bench transformer`` runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow import results
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.pipelines.flags import flags
from tritflow.profiling.contenders import (
    CONTENDERS,
    STEPS,
    TEXT_TOKENS,
    Schedule,
    build,
    set_attention,
    step_inputs,
)
from tritflow.profiling.isolate import Task, run_isolated, serve
from tritflow.profiling.latency import quantiles
from tritflow.profiling.lora import Beside
from tritflow.profiling.lora import line as lora_line
from tritflow.profiling.step_times import kernel_times, timed

MODULE = "tritflow.profiling.transformer"
BASELINES = ("bf16 compiled", "bf16 eager", "fp8 compiled")
MEMORY_BASELINE = "bf16 eager"


def time_attention(size: int, batch: int, config: Mapping[str, Any]) -> dict[str, Any]:
    """Milliseconds of one attention call per kernel, at the model's sizes and in the fused forward's layout."""
    tokens = (size // 16) ** 2 + TEXT_TOKENS
    shape = (batch, tokens, config["num_attention_heads"], config["attention_head_dim"])
    q, k, v = (torch.randn(shape, device="cuda").bfloat16().transpose(1, 2) for _ in range(3))
    found: dict[str, Any] = {}
    for name in ("cudnn", "flash", "default"):
        set_attention(name)
        try:
            times = timed(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v), 20, 5)
            found[name] = quantiles(times)
        except RuntimeError as error:
            found[name] = {"error": str(error).splitlines()[0][:200]}
    return found


def measure(task: Task, device: str = "cuda") -> dict[str, Any]:
    """Build one contender, time its steps, read its peak memory, free it."""
    try:
        return _measure(task, device)
    finally:
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()


@torch.no_grad()
def _measure(task: Task, device: str) -> dict[str, Any]:
    config, settings = task["config"], task["settings"]
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    model = build(settings, config, device)
    torch.cuda.synchronize()
    built = time.perf_counter() - begin
    load_peak = torch.cuda.max_memory_allocated() - before
    weights = torch.cuda.memory_allocated() - before
    inputs = step_inputs(config, task["size"], task["batch"], device, torch.bfloat16)
    timesteps = Schedule(STEPS, device).timesteps
    turn = 0

    def step() -> Tensor:
        nonlocal turn
        t = timesteps[turn % STEPS]
        turn += 1
        # As FluxPipeline hands it over.
        out: Tensor = model(**inputs, timestep=t.expand(task["batch"]).to(torch.bfloat16) / 1000)[0]
        return out

    path = flags(model, device)
    beside = Beside(model, step, settings["lora"], task["count"]) if "lora" in settings else None
    begin = time.perf_counter()
    first = step()
    torch.cuda.synchronize()
    first_seconds = time.perf_counter() - begin
    finite = bool(torch.isfinite(first).all())
    times = timed(step, task["count"], 3)
    turn = 0
    again = [step() for _ in range(2)]
    turn = 0
    repeats = all(torch.equal(a, step()) for a in again)
    peak = torch.cuda.max_memory_allocated() - before
    kernels = kernel_times(step)
    return {
        "milliseconds": quantiles(times),
        "peak_bytes": peak,
        "load_peak_bytes": load_peak,
        "weight_bytes": weights,
        "reserved_bytes": torch.cuda.max_memory_reserved(),
        "build_seconds": round(built, 2),
        "first_step_seconds": round(first_seconds, 2),
        "finite": finite,
        "flags": path,
        "same_bits_again": repeats,
        **kernels,
        **({} if beside is None else {"lora": beside.finish(quantiles(times))}),
    }


@torch.no_grad()
def check(task: Task, device: str = "cuda") -> dict[str, Any]:
    """Relative errors of a backend on a few blocks of the real width, stock and optimized, against the reference."""
    from tritflow.models.flux1 import is_modulation
    from tritflow.modules import TernaryLinear
    from tritflow.pipelines import synthetic
    from tritflow.pipelines.optimize import deoptimize, optimize

    config = {**task["config"], "num_layers": 2, "num_single_layers": 2}
    model = synthetic.random_ternary(config, device)
    inputs = step_inputs(config, task["size"], 1, device, torch.bfloat16)
    inputs["timestep"] = torch.full((1,), 0.5, device=device, dtype=torch.bfloat16)
    linears = [m for name, m in model.named_modules() if isinstance(m, TernaryLinear)]
    modulation = {id(m) for name, m in model.named_modules() if is_modulation(name)}

    def configure(mode: Any, dtype: Any, backend: Any) -> None:
        for linear in linears:
            linear.mode, linear.activation_dtype = mode, dtype
            linear.backend = "auto" if id(linear) in modulation else backend

    found: dict[str, Any] = {}
    for mode, dtype in (("w2a8", "int8"), ("w2a8", "float8_e4m3fn"), ("w2a16", "int8")):
        configure(mode, dtype, "reference")
        truth = model(**inputs)[0].double()
        configure(mode, dtype, task["backend"])
        for path in ("stock", "eager", "graph"):
            label = f"{mode if mode == 'w2a16' else f'{mode} {dtype}'}, {path}"
            try:
                if path != "stock":
                    optimize(model, cuda_graph=path == "graph")
                for _ in range(3 if path == "graph" else 1):
                    out = model(**inputs)[0]
                found[label] = float((out.double() - truth).norm() / truth.norm())
            except (RuntimeError, ValueError) as error:
                if "CUDA error" in str(error):
                    raise
                found[label] = str(error).splitlines()[0][:200]
            deoptimize(model)
    return found


def handle(task: Task) -> dict[str, Any]:
    """One task, in the child process."""
    torch.manual_seed(0)
    try:
        if task["kind"] == "attention":
            with torch.no_grad():
                return time_attention(task["size"], task["batch"], task["config"])
        set_attention(task["attention"])
        return check(task) if task["kind"].startswith("check") else measure(task)
    except RuntimeError as error:
        if "CUDA error" in str(error):
            # Nothing works in this process any more; the parent starts another one on what is left.
            print(str(error).splitlines()[0], file=sys.stderr, flush=True)
            os._exit(3)
        raise


def bench(
    out: Path,
    *,
    seconds: float = 350.0,
    size: int = 1024,
    batch: int = 1,
    count: int = 20,
    contenders: Sequence[str] = (),
    attention: str = "fastest",
    checked: bool = True,
    resume: bool = False,
    config: Mapping[str, Any] = FLUX1_DEV,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measure contenders one after the other; `out/transformer.json` is complete after each.

    Args:
        out: folder.
        seconds: for everything: a contender that runs longer is ended, and says so.
        size: of the pictures, in pixels.
        batch: pictures at once.
        count: timed steps.
        contenders: names of `CONTENDERS`; all when empty.
        attention: `cudnn`, `flash`, `default` (PyTorch's choice), or `fastest` of them by measurement.
        checked: compare the optimized forward with the stock one first.
        resume: keep what `out/transformer.json` has of an earlier call on this GPU with these settings, but for what
            failed. The run's `calls` tells when each call measured what: ratios across calls are of one machine only
            if it was the same one.
        config: of the transformer.
        say: told each result in a line.

    Returns:
        One run for `tritflow.results`, as in the file.

    Raises:
        ValueError: an unknown contender.
    """
    unknown = [name for name in contenders if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"unknown contender '{unknown[0]}'; choose from: {', '.join(CONTENDERS)}")
    deadline = time.monotonic() + seconds
    out.mkdir(parents=True, exist_ok=True)
    common = {"size": size, "batch": batch, "config": dict(config), "count": count}
    run: dict[str, Any] = {
        **results.provenance("cuda"),
        "model": "FLUX.1-dev's config, random weights",
        "settings": {"size": size, "batch": batch, "text_tokens": TEXT_TOKENS, "steps": STEPS, "timed_steps": count},
        "contenders": {},
    }
    if resume:
        run |= _kept(out / "transformer.json", run, attention)
    run["calls"] = [*run.get("calls", []), {"time": run.get("time"), "measured": []}]

    def note(task: Task, result: dict[str, Any]) -> None:
        if task["kind"] == "contender":
            run["contenders"][task["name"]] = {"settings": task["settings"], **result}
            if "milliseconds" in result:
                run["calls"][-1]["measured"].append(task["name"])
            say(line(task["name"], result))
        else:
            run[task["kind"]] = result
            say(f"{task['kind']}: {json.dumps(result)}")
        results.write_atomically(out / "transformer.json", json.dumps(run, indent=1).encode())

    if attention == "fastest" and "attention" in run:
        attention = fastest(run["attention"])
    elif attention == "fastest":
        probe = [{"kind": "attention", **common}]
        run_isolated(MODULE, probe, silence=90, deadline=deadline, on_result=note)
        attention = fastest(run["attention"])
    run["attention_kernel"] = attention
    tasks: list[Task] = []
    if checked:
        tasks += [{"kind": f"check {backend}", "backend": backend} for backend in ("triton", "scratch")]
    for name in contenders or CONTENDERS:
        if name in run["contenders"]:
            continue
        settings = CONTENDERS[name]
        if checked and settings.get("backend") == "hopper" and not any(t["kind"] == "check hopper" for t in tasks):
            tasks.append({"kind": "check hopper", "backend": "hopper"})
        tasks.append({"kind": "contender", "name": name, "settings": settings, "backend": settings.get("backend")})
    tasks = [task for task in tasks if task["kind"] not in run]
    for risky, group in groupby(tasks, key=lambda task: task["backend"] == "hopper"):
        # A kernel that is not proven may hang: it gets less patience, and a process of its own.
        given = [{**task, "attention": attention, **common} for task in group]
        run_isolated(MODULE, given, silence=60 if risky else 200, deadline=deadline, on_result=note)
    run["contenders"] = compare(run["contenders"])
    run["lora"] = {name: c["lora"] for name, c in run["contenders"].items() if "lora" in c}
    results.write_atomically(out / "transformer.json", json.dumps(run, indent=1).encode())
    return run


def _kept(path: Path, run: Mapping[str, Any], attention: str) -> dict[str, Any]:
    """What an earlier call found that this one need not find again: of the same GPU, versions and settings."""
    if not path.is_file():
        return {}
    found: dict[str, Any] = json.loads(path.read_text())
    if any(found.get(key) != run.get(key) for key in ("device", "versions", "model", "settings")):
        return {}
    if attention not in ("fastest", found.get("attention_kernel")):
        return {}
    good = {name: result for name, result in found["contenders"].items() if "milliseconds" in result}
    checks = {k: v for k, v in found.items() if (k.startswith("check ") or k == "attention") and "error" not in v}
    return {**checks, "calls": found.get("calls", []), "contenders": good}


def fastest(times: Mapping[str, Any]) -> str:
    """The attention kernel with the smallest median; PyTorch's own choice if none was timed."""
    good = {name: t["p50"] for name, t in times.items() if isinstance(t, dict) and "p50" in t and name != "default"}
    return min(good, key=lambda name: good[name]) if good else "default"


def compare(contenders: Mapping[str, Any]) -> dict[str, Any]:
    """The contenders with `speed`: baseline -> its median over theirs, and `memory`: peak of bf16 eager over theirs."""
    good = {name: c for name, c in contenders.items() if "milliseconds" in c}
    found: dict[str, Any] = {name: dict(c) for name, c in contenders.items()}
    for name, c in good.items():
        p50 = c["milliseconds"]["p50"]
        found[name]["speed"] = {
            base: round(good[base]["milliseconds"]["p50"] / p50, 4) for base in BASELINES if base in good
        }
        if MEMORY_BASELINE in good:
            found[name]["memory"] = round(good[MEMORY_BASELINE]["peak_bytes"] / c["peak_bytes"], 4)
    return found


def line(name: str, result: Mapping[str, Any]) -> str:
    """A contender's result in one line."""
    if "error" in result:
        return f"{name:40} {result['error']}"
    ms = result["milliseconds"]
    return (
        f"{name:40} {ms['p50']:8.2f} ms (p20 {ms['p20']:.2f}, p80 {ms['p80']:.2f})  "
        f"peak {result['peak_bytes'] / 1e9:6.2f} GB  "
        f"built {result['build_seconds']} s, first step {result['first_step_seconds']} s"
        f"{'' if result['finite'] else '  NOT FINITE'}{'' if result['same_bits_again'] else '  bits differ'}"
    )


def table(run: Mapping[str, Any]) -> str:
    """The run in plain text."""
    lines = [f"{run['device']}, {run['settings']['size']}x{run['settings']['size']}, batch {run['settings']['batch']}"]
    for name, result in run["contenders"].items():
        lines.append(line(name, result))
        against = [f"{value:.2f}x {base}" for base, value in result.get("speed", {}).items() if base != name]
        if "memory" in result:
            against.append(f"{result['memory']:.2f}x less memory")
        if "lora" in result:
            lines.append(f"    {lora_line(result['lora'])}")
        if against:
            lines.append(f"    {', '.join(against)}")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("transformer-bench"), help="folder for transformer.json")
    parser.add_argument("--seconds", type=float, default=350.0, help="for everything; what was found by then is kept")
    parser.add_argument("--size", type=int, default=1024, help="of the pictures, in pixels")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--count", type=int, default=20, help="timed steps")
    parser.add_argument("--contender", action="append", default=[], help="only this one; may be repeated")
    parser.add_argument("--attention", default="fastest", choices=["fastest", "cudnn", "flash", "default"])
    parser.add_argument("--no-check", action="store_true", help="do not compare with the stock forward first")
    parser.add_argument("--resume", action="store_true", help="keep what --out has of an earlier call on this GPU")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        serve(options.worker, handle)
        return
    if not torch.cuda.is_available():
        raise SystemExit("this bench needs a CUDA device, and this machine shows none")
    run = bench(
        options.out,
        seconds=options.seconds,
        size=options.size,
        batch=options.batch,
        count=options.count,
        contenders=options.contender,
        attention=options.attention,
        checked=not options.no_check,
        resume=options.resume,
        say=lambda text: print(text, flush=True),
    )
    print(table(run))


if __name__ == "__main__":
    main(sys.argv[1:])
