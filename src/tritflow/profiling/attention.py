"""Benchmark of 8-bit attention against PyTorch's in bf16 on the same GPU, in one run: times and errors.

Times are of CUDA graph replays over rotating inputs, rounds interleaved; attention on inputs that are quantized
already, and with the pass that quantizes them ("in all"). Errors are relative, `|y - x| / |x|`, against float32.
Every configuration of the Hopper kernel is first tried in a process of its own, which may hang or crash.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritflow.kernels import qk_norm_rope
from tritflow.models.flux1_blocks import attend
from tritflow.profiling.isolate import Task, run_side_by_side, serve
from tritflow.profiling.kernels import Candidate, graph_times
from tritflow.results import provenance

Say = Callable[[str], None]
Inputs = tuple[Tensor, Tensor, Tensor]
Shape = tuple[int, int, int]
"""Tokens, heads, features of a head."""
DTYPES = ("int8", "float8_e4m3fn")
RIVALS = {"cudnn bf16": SDPBackend.CUDNN_ATTENTION, "flash bf16": SDPBackend.FLASH_ATTENTION}
KINDS = ("normal", "biased keys", "peaked", "outlier values")
HOPPER: list[dict[str, Any]] = [
    {},
    {"half": True},
    {"half": True, "ahead": False},
    {"half": True, "ahead": False, "skip": True},
    {"half": True, "consumers": 3, "keys": 64},
    {"half": True, "consumers": 3, "keys": 64, "ahead": False, "skip": True},
]
"""Configurations of the Hopper kernel that are tried."""
_SETS = 3
_REST = (None, None, None, None, None, 1e-6)
"""One stream, and the norms' epsilon: what `normed_attention` takes between `projected` inputs and a dtype."""
_WRONG = 0.1  # relative error on Gaussian inputs that no rounding explains


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention in float32, head by head."""
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    with _full_precision():
        for h in range(q.shape[2]):
            a, b, c = (t[:, :, h].float() for t in (q, k, v))
            out[:, :, h] = torch.softmax(a @ b.transpose(1, 2) * q.shape[-1] ** -0.5, -1) @ c
    return out


@contextmanager
def _full_precision() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def inputs(shape: Shape, kind: str, seed: int = 0, device: str = "cuda") -> Inputs:
    """bf16 queries, keys and values [1, tokens, heads, features].

    `normal`: Gaussian. `biased keys`: every 16th key channel is off by 8 standard deviations times a Gaussian, the
    same for all tokens of a head. `peaked`: queries four times as large, so that few keys count. `outlier values`:
    every 16th value channel ten times as large.

    Raises:
        ValueError: another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind of inputs '{kind}': use one of {', '.join(KINDS)}")
    tokens, heads, features = shape
    g = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn((1, tokens, heads, features), generator=g, device=device) for _ in range(3))
    some = torch.zeros(features, device=device)
    some[::16] = 1
    if kind == "biased keys":
        k += 8 * some * torch.randn((heads, features), generator=g, device=device)
    elif kind == "peaked":
        q *= 4
    elif kind == "outlier values":
        v *= 1 + 9 * some
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Euclidean."""
    return float((found.float() - expected).norm() / expected.norm())


def projected(shape: Shape, seed: int = 0, device: str = "cuda") -> tuple[Tensor, ...]:
    """Queries, keys and values side by side as a product writes them, norm weights, tables (a number a pair)."""
    tokens, heads, features = shape
    g = torch.Generator(device).manual_seed(seed)
    three = torch.randn((1, tokens, 3, heads, features), generator=g, device=device).bfloat16().unbind(2)
    weights = [(torch.rand(features, generator=g, device=device) + 0.5).bfloat16() for _ in range(2)]
    angles = torch.rand((tokens, features // 2), generator=g, device=device) * 6.3
    return (*three, *weights, angles.cos(), angles.sin())


def turned(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> Inputs:
    """`projected` inputs, normed and turned in a pass of its own."""
    *weights, cos, sin = rest
    q_weight, k_weight = weights
    cos, sin = (t.repeat_interleave(2, dim=1) for t in (cos, sin))
    return *qk_norm_rope(q, k, q_weight, k_weight, cos, sin), v


class Contender:
    """One way to compute attention: `prepare` inputs (nothing, in 16 bits), then `run` on what that gave.

    `whole` does it from `projected` inputs.
    """

    def __init__(
        self, name: str, prepare: Callable[..., Any], run: Callable[..., Tensor], whole: Callable[..., Tensor]
    ) -> None:
        self.name, self.prepare, self.run, self.whole = name, prepare, run, whole

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.run((q, k, v), self.prepare(q, k, v))


def rivals() -> list[Contender]:
    """PyTorch's attentions in bf16."""

    def pinned(backend: SDPBackend) -> Callable[[Inputs, None], Tensor]:
        def run(given: Inputs, prepared: None) -> Tensor:
            with sdpa_kernel(backend):
                return attend(*given)

        return run

    def contender(name: str, backend: SDPBackend) -> Contender:
        run = pinned(backend)
        return Contender(name, lambda q, k, v: None, run, lambda *given: run(given[:3], None))

    return [contender(name, backend) for name, backend in RIVALS.items()]


def plain(dtype: str) -> Contender:
    """Plain Triton's kernel."""
    from tritflow.kernels.triton.attention import attend, normed_attention
    from tritflow.kernels.triton.attention_inputs import quantize

    return Contender(
        f"triton {dtype}",
        lambda q, k, v: quantize(q, k, v, dtype),
        lambda given, prepared: attend(prepared, given[2]),
        lambda *given: normed_attention(*given, *_REST, dtype, None),
    )


def hopper(dtype: str, settings: dict[str, Any]) -> Contender:
    """The Hopper kernel in one configuration; it quantizes its queries itself."""
    from tritflow.kernels.hopper.attention_launch import AttentionConfig, attend, normed_attention
    from tritflow.kernels.triton.attention_inputs import quantize

    config = AttentionConfig(**settings)
    return Contender(
        f"hopper {dtype}, {config.name}",
        lambda q, k, v: quantize(None, k, v, dtype),
        lambda given, prepared: attend(given[0], prepared, config=config),
        lambda *given: normed_attention(*given, *_REST, dtype, None, config=config),
    )


def handle(task: Task) -> dict[str, Any]:
    """A worker's task: is a configuration of the Hopper kernel right, and the same 100 times?"""
    given = inputs(tuple(task["shape"]), "normal")
    contender = hopper(task["dtype"], task["settings"])
    first = contender(*given)
    error = relative_error(first, exact(*given))
    if not error < _WRONG:
        return {"error": f"wrong: relative error {error:.3g}"}
    if not all(torch.equal(first, contender(*given)) for _ in range(100)):
        return {"error": "wrong: results change from call to call"}
    raw = projected(tuple(task["shape"]))
    whole = relative_error(contender.whole(*raw), exact(*turned(*raw)))
    if not whole < _WRONG:
        return {"error": f"wrong from a product's outputs: relative error {whole:.3g}"}
    return {"relative_error": error, "from_products": whole}


def sound_settings(shape: Shape, say: Say, seconds: float) -> dict[str, list[dict[str, Any]]]:
    """The Hopper kernel's configurations that are right here, by the dtype of queries and keys."""
    from tritflow.kernels.hopper import why_not

    found: dict[str, list[dict[str, Any]]] = {dtype: [] for dtype in DTYPES}
    reason = why_not(torch.cuda.current_device())
    if reason is not None:
        say(f"hopper: {reason}")
        return found
    tasks: list[Task] = [{"shape": [shape[0], 2, shape[2]], "dtype": d, "settings": s} for s in HOPPER for d in DTYPES]

    def note(task: Task, result: dict[str, Any]) -> None:
        say(f"{hopper(task['dtype'], task['settings']).name}: {result}")
        if "error" not in result:
            found[task["dtype"]].append(task["settings"])

    deadline = time.monotonic() + seconds
    run_side_by_side("tritflow.profiling.attention", tasks, silence=60.0, deadline=deadline, on_result=note)
    return found


def measure(shape: Shape, contenders: list[Contender], *, rounds: int = 3, say: Say = print) -> dict[str, Any]:
    """Times and errors at one shape.

    Returns {"shape": [1, tokens, heads, features], "microseconds": {name: {"p20", "p50", "p80"}} (8-bit contenders also
    as "NAME, in all"), "tflops", "speedup" over cuDNN, "contenders": {name: see `_rows`}, "errors": {kind of inputs:
    {name: relative error}}}; a contender that fails has {"error": ...} for its time.

    Attention that runs for long is slower, since the clock follows the power. "among_products" is how a model calls it:
    each call after a bf16 product, whose own time is taken off. "from_products": with norm, rotation and quantization
    of what a product wrote (16-bit contenders: `qk_norm_rope` before).
    """
    sets = [inputs(shape, "normal", seed) for seed in range(_SETS)]
    candidates = []
    x, w = (torch.randn(size, 3072, device=sets[0][0].device).bfloat16() for size in (shape[0], 12288))
    mixed: list[Candidate] = []

    def after_a_product(run: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        return lambda i: (torch.mm(x, w.T), run(i))[1]

    for contender in contenders:
        try:
            prepared = [contender.prepare(*given) for given in sets]
        except Exception as error:
            say(f"{contender.name}: {str(error).splitlines()[0][:200]}")
            continue

        def alone(i: int, contender: Contender = contender, prepared: list[Any] = prepared) -> Tensor:
            return contender.run(sets[i], prepared[i])

        def in_all(i: int, contender: Contender = contender) -> Tensor:
            return contender(*sets[i])

        candidates.append(Candidate(contender.name, alone, _SETS))
        mixed.append(Candidate(contender.name, after_a_product(alone), _SETS))
        if contender.name not in RIVALS:
            candidates.append(Candidate(f"{contender.name}, in all", in_all, _SETS))
    times = graph_times(candidates, rounds=rounds)
    medians = {name: t["p50"] for name, t in times.items() if "p50" in t}
    product = Candidate("product", lambda i: torch.mm(x, w.T), _SETS)
    both = {name: t["p50"] for name, t in graph_times([*mixed, product], rounds=rounds).items() if "p50" in t}
    among = {name: us - both["product"] for name, us in both.items() if name != "product"}
    whole = _from_products(shape, [c for c in contenders if c.name in medians], rounds)
    errors: dict[str, dict[str, float]] = {}
    for kind in KINDS:
        given = inputs(shape, kind, 7)
        truth = exact(*given)
        errors[kind] = {c.name: relative_error(c(*given), truth) for c in contenders if c.name in medians}
    work = 4e-6 * shape[0] ** 2 * shape[1] * shape[2]
    base = medians.get("cudnn bf16")
    for name, us in medians.items():
        ratio = "" if base is None else f" {base / us:.3f}x"
        if name in whole:
            ratio += f" (from products {whole[name]:.1f} us {whole.get('cudnn bf16', 0.0) / whole[name]:.3f}x)"
        if name in among:
            ratio += f" (among products {among[name]:.1f} us {among.get('cudnn bf16', 0.0) / among[name]:.3f}x)"
        rest = "  ".join(f"{kind} {e[name]:.5f}" for kind, e in errors.items() if name in e)
        say(f"{name:48} {us:8.1f} us {work / us:7.1f} TFLOP/s{ratio}  {rest}")
    return {
        "shape": [1, *shape],
        "microseconds": times,
        "tflops": {name: round(work / us, 1) for name, us in medians.items()},
        "speedup": {} if base is None else {name: round(base / us, 3) for name, us in medians.items()},
        "contenders": _rows(medians, among, whole, errors["normal"]),
        "errors": errors,
    }


def _from_products(shape: Shape, contenders: list[Contender], rounds: int) -> dict[str, float]:
    """Medians of norm, rotation, quantization and attention, by contender."""
    sets = [projected(shape, seed) for seed in range(_SETS)]

    def whole(contender: Contender) -> Callable[[int], Tensor]:
        if contender.name not in RIVALS:
            return lambda i: contender.whole(*sets[i])
        # A model has whole tables for these; made once, not timed.
        tables = [[t.repeat_interleave(2, dim=1) for t in given[5:]] for given in sets]
        args: list[tuple[Any, ...]] = [(*g[:2], *g[3:5], *t) for g, t in zip(sets, tables, strict=True)]
        return lambda i: contender.whole(*qk_norm_rope(*args[i]), sets[i][2])

    times = graph_times([Candidate(c.name, whole(c), _SETS) for c in contenders], rounds=rounds)
    return {name: t["p50"] for name, t in times.items() if "p50" in t}


def _rows(
    medians: dict[str, float], among: dict[str, float], whole: dict[str, float], errors: dict[str, float]
) -> dict[str, dict[str, Any]]:
    """By contender: microseconds alone, with quantization, among and from products, ratios to cuDNN's, the error."""
    found: dict[str, dict[str, Any]] = {}
    for name in errors:
        row: dict[str, Any] = {"error": errors[name]}
        for kind, times, key in (
            ("alone", medians, name),
            ("in_all", medians, f"{name}, in all"),
            ("among_products", among, name),
            ("from_products", whole, name),
        ):
            if key in times:
                row[kind] = times[key]
                if "cudnn bf16" in times:
                    row[f"{kind}_speedup"] = times["cudnn bf16"] / times[key]
        found[name] = row
    return found


def bench(shapes: list[Shape], note: str = "", *, seconds: float = 120.0, say: Say = print) -> dict[str, Any]:
    """`measure` at every shape, with where it was measured: one run of the results.

    Args:
        shapes: tokens, heads, features; the Hopper kernel is checked at the first, for at most `seconds`.
        note: kept with the result.
        seconds: for the checks.
        say: told each result in a line.
    """
    sound = sound_settings(shapes[0], say, seconds)
    ours = [hopper(dtype, settings) for dtype in DTYPES for settings in sound[dtype]]
    contenders = [*rivals(), *(plain(dtype) for dtype in DTYPES), *ours]
    return {**provenance("cuda"), "note": note, "attention": [measure(shape, contenders, say=say) for shape in shapes]}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="tritflow.profiling.attention", description="see `tritflow bench attention`")
    parser.add_argument("--worker", required=True, help=argparse.SUPPRESS)
    serve(parser.parse_args(arguments).worker, handle)


if __name__ == "__main__":
    main(sys.argv[1:])
