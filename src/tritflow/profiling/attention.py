"""Benchmark of 8-bit attention against PyTorch's in bf16 on the same GPU, in one run: times and errors.

Times are of CUDA graph replays over rotating inputs, rounds interleaved; attention alone and with the pass that
quantizes keys and values. Errors are relative, `|y - x| / |x|`, against attention in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from tritflow.profiling.kernels import Candidate, graph_times

Inputs = tuple[Tensor, Tensor, Tensor]
DTYPES = ("int8", "float8_e4m3fn")
RIVALS = {"cudnn bf16": SDPBackend.CUDNN_ATTENTION, "flash bf16": SDPBackend.FLASH_ATTENTION}
_SETS = 3


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention on [B, S, H, D]."""
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


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


def inputs(shape: tuple[int, int, int, int], kind: str, seed: int = 0, device: str = "cuda") -> Inputs:
    """bf16 queries, keys and values.

    `normal`: Gaussian. `biased keys`: every 16th key channel is off by a constant of 8 standard deviations times a
    Gaussian, the same for all tokens of a head. `peaked`: queries four times as large, so that few keys count.
    `outlier values`: every 16th value channel ten times as large.
    """
    g = torch.Generator(device).manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g, device=device) for _ in range(3))
    some = torch.zeros(shape[3], device=device)
    some[::16] = 1
    if kind == "biased keys":
        k += 8 * some * torch.randn((shape[2], shape[3]), generator=g, device=device)
    elif kind == "peaked":
        q *= 4
    elif kind == "outlier values":
        v *= 1 + 9 * some
    elif kind != "normal":
        raise ValueError(f"unknown kind of inputs '{kind}': use one of {', '.join(KINDS)}")
    return q.bfloat16(), k.bfloat16(), v.bfloat16()


KINDS = ("normal", "biased keys", "peaked", "outlier values")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, Euclidean."""
    return float((found.float() - expected).norm() / expected.norm())


def _pinned(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v)

    return run


def _ours(hopper: bool) -> dict[str, tuple[str, Callable[..., Tensor]]]:
    """Name to (dtype, attention on quantized keys and values)."""
    from tritflow.kernels.triton import attention as plain

    found: dict[str, tuple[str, Callable[..., Tensor]]] = {}
    for dtype in DTYPES:
        for codes, ones in ((0, False), (0, True), (1, True)):
            blocks = {**plain.launch_blocks(128, True), "CODES": codes, "ONES": ones}
            found[f"triton {dtype} codes={codes} ones={ones}"] = (
                dtype,
                lambda q, v, parts, blocks=blocks: plain.attend(q, v, parts, blocks=blocks),
            )
    if hopper:
        from tritflow.kernels.hopper import attention_launch as fast

        for dtype in DTYPES:
            for kind, codes, ones in (
                ("h", 1, True),
                ("h", 2, True),
                ("h", 1, False),
                ("h", 0, False),
                ("h", 0, True),
                ("i", 1, True),
                ("i", 0, True),
                ("i", 0, False),
            ):

                def run(
                    q: Tensor, v: Tensor, parts: Any, kind: str = kind, codes: int = codes, ones: bool = ones
                ) -> Tensor:
                    return fast.attend(q, parts, codes=codes, ones=ones, in_turn=kind == "i")

                found[f"{kind} {dtype} codes={codes} ones={ones}"] = (dtype, run)
    return found


def bench_attention(
    tokens: int = 4608,
    heads: int = 24,
    features: int = 128,
    *,
    hopper: bool = True,
    rounds: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Times and errors of every attention that runs here, [1, tokens, heads, features].

    Returns {"shape", "seconds": {name: {"p20", "p50", "p80"}} in microseconds, "tflops", "speedup" over cuDNN
    (attention alone), "speedup_in_all" (with quantization), "errors": {kind of inputs: {name: relative error}}}.
    """
    from tritflow.kernels.triton.attention import quantize_keys_values

    shape = (1, tokens, heads, features)
    sets = [inputs(shape, "normal", seed) for seed in range(_SETS)]
    parts = {dtype: [quantize_keys_values(k, v, dtype) for _, k, v in sets] for dtype in DTYPES}
    mine = _ours(hopper)
    truth = exact(*sets[0])
    candidates, errors = [], {kind: {} for kind in KINDS}  # type: ignore[var-annotated]
    for name, backend in RIVALS.items():
        call = _pinned(backend)
        try:
            errors["normal"][name] = relative_error(call(*sets[0]), truth)
        except RuntimeError as error:
            say(f"{name}: {str(error).splitlines()[0]}")
            continue
        candidates.append(Candidate(name, lambda i, call=call: call(*sets[i]), _SETS))
    for dtype in DTYPES:
        candidates.append(
            Candidate(f"quantize {dtype}", lambda i, d=dtype: quantize_keys_values(*sets[i][1:], d), _SETS)
        )
    for name, (dtype, run) in mine.items():
        try:
            errors["normal"][name] = relative_error(run(sets[0][0], sets[0][2], parts[dtype][0]), truth)
        except Exception as error:
            say(f"{name}: {str(error).splitlines()[0][:200]}")
            continue

        def alone(i: int, run: Any = run, dtype: str = dtype) -> Tensor:
            out: Tensor = run(sets[i][0], sets[i][2], parts[dtype][i])
            return out

        def in_all(i: int, run: Any = run, dtype: str = dtype) -> Tensor:
            q, k, v = sets[i]
            out: Tensor = run(q, v, quantize_keys_values(k, v, dtype))
            return out

        candidates.append(Candidate(name, alone, _SETS))
        candidates.append(Candidate(f"{name}, in all", in_all, _SETS))
        say(f"{name}: error {errors['normal'][name]:.5f}")
    times = graph_times(candidates, rounds=rounds)
    work = 4e-6 * tokens * tokens * heads * features
    base = times["cudnn bf16"]["p50"]
    result: dict[str, Any] = {
        "shape": list(shape),
        "microseconds": times,
        "tflops": {n: round(work / t["p50"], 1) for n, t in times.items() if "p50" in t and "quantize" not in n},
        "speedup": {n: round(base / t["p50"], 3) for n, t in times.items() if "p50" in t and "quantize" not in n},
        "errors": errors,
    }
    for name, ratio in result["speedup"].items():
        say(f"{name:44} {times[name]['p50']:8.1f} us {result['tflops'][name]:7.1f} TFLOP/s {ratio:.3f}x")
    for kind in KINDS[1:]:
        some = inputs(shape, kind, 7)
        truth = exact(*some)
        for name, backend in RIVALS.items():
            if name in times and name in errors["normal"]:
                errors[kind][name] = relative_error(_pinned(backend)(*some), truth)
        for name, (dtype, run) in mine.items():
            if name in errors["normal"]:
                out = run(some[0], some[2], quantize_keys_values(some[1], some[2], dtype))
                errors[kind][name] = relative_error(out, truth)
    for name in errors["normal"]:
        say(f"{name:44} " + "  ".join(f"{kind} {errors[kind].get(name, float('nan')):.5f}" for kind in KINDS))
    return result


def run(shapes: list[tuple[int, int, int]], note: str = "", *, hopper: bool = True, say: Any = print) -> dict[str, Any]:
    """`bench_attention` at each (tokens, heads, features), with where it was measured: one run of the results."""
    from tritflow.results import provenance

    found = []
    for shape in shapes:
        say(f"tokens, heads, features: {shape}")
        found.append(bench_attention(*shape, hopper=hopper, say=say))
    return {**provenance("cuda"), "note": note, "attention": found}
