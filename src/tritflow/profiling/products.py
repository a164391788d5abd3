"""What a kernel benchmark times: ternary products, the dense rivals of the same shape, and their inputs.

Inputs come in sets that rotate, so that no cache is measured. Rivals get Gaussian *and* ternary-valued weights (tensor
cores draw less power on small values), fast accumulation on and off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tritflow.profiling.timing import Candidate

_FOUR = {"parts": 4, "chunk": 64, "rows": 16}
_WIDE = {**_FOUR, "rows": 32, "registers": 96}
_DIGITS = {**_FOUR, "digits": True}
_NARROW = {"split": 1, "block_n": 128, "group": 4}
VARIANTS: dict[str, dict[str, Any]] = {
    "wide": {},
    "wide, split 1": {"split": 1, "group": 4},
    "one tile": {"split": 1, "stages": 4, "lag": 0, "persistent": False},
    "narrow": {**_NARROW, "stages": 8, "lag": 2},
    "192 x 192": {"consumers": 3, "block_m": 192, "block_n": 192, "stages": 5, "lag": 1},
    "128 x 192": {"consumers": 3, "block_m": 128, "block_n": 192, "stages": 7, "lag": 1},
    "16-bit wide": {"stages": 4, "lag": 1},
    "16-bit narrow": {**_NARROW, "stages": 5, "lag": 1},
    "16-bit 128 x 192": {"consumers": 3, "block_m": 128, "block_n": 192, "stages": 4, "lag": 1},
}
"""Configurations of the Hopper product that are checked and timed by name; see `hopper.launch.Config`."""
BACKENDS = ("triton", "scratch")
"""Timed beside the Hopper product's variants, as `auto` would call them."""
SKINNY: dict[str, dict[str, Any]] = {
    "4 warps": _FOUR,
    "4 warps, 56 registers": {**_FOUR, "registers": 56},
    "4 warps, 32 rows, 96 registers": _WIDE,
    "4 warps, early": {**_FOUR, "early": True},
    "digits": _DIGITS,
    "digits, early": {**_DIGITS, "early": True},
    "digits, 32 rows": {**_DIGITS, "rows": 32},
    "digits, 48 rows": {**_DIGITS, "rows": 48},
}
"""Settings of the product with few rows; see `hopper.skinny`."""
LIMITS: dict[str, dict[str, Any]] = {
    "read": {},
    "read, 32 rows": {"rows": 32},
    "empty": {"read": False},
    "empty, 32 rows": {"read": False, "rows": 32},
}
"""Kernels of the product's grid that do less than it has to; see `hopper.limits`."""


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


def pack(trits: Tensor) -> Tensor:
    from tritflow.formats.packing import pack_2bit

    return pack_2bit(trits)


def activation_dtype(name: str) -> torch.dtype:
    return {"int8": torch.int8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}[name]


def input_sets(bytes_a_call: int) -> int:
    """Input sets that together are well over twice the last-level cache."""
    return max(2, min(12, math.ceil(160e6 / bytes_a_call)))


def rivals_16bit(m: int, n: int, k: int) -> list[Candidate]:
    """Dense bf16 products of the same shape, with Gaussian and with ternary-valued weights."""
    sets = max(2, input_sets(m * k + n * k) // 2)
    x, w = ([torch.randn(rows, k, device="cuda").bfloat16() for _ in range(sets)] for rows in (m, n))
    trits = [random_trits(n, k).bfloat16() for _ in range(sets)]
    linear = torch.nn.functional.linear
    return [
        Candidate("bf16 gauss", lambda i: linear(x[i], w[i]), sets),
        Candidate("bf16 trits", lambda i: linear(x[i], trits[i]), sets),
    ]


def rivals(m: int, n: int, k: int) -> list[Candidate]:
    """Dense products of the same shape: bf16, int8 and fp8 (row-wise and tensor-wise scales)."""
    found = rivals_16bit(m, n, k)
    sets = input_sets(m * k + n * k)

    trits = [random_trits(n, k) for _ in range(sets)]
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


def hopper(q: Tensor, scale: Tensor, *rest: Tensor | None, **options: Any) -> Tensor:
    """The Hopper product for quantized or 16-bit activations (whose scale is not used)."""
    from tritflow.kernels.hopper.launch import w2a8_gemm, w2a16_gemm

    if q.dtype == torch.bfloat16:
        return w2a16_gemm(q, *rest, **options)  # type: ignore[arg-type]
    return w2a8_gemm(q, scale, *rest, **options)  # type: ignore[arg-type]


def ours(m: int, n: int, k: int, variants: list[str], kind: str, backends: tuple[str, ...] = ()) -> list[Candidate]:
    """The ternary product of `kind` int8, fp8 or bf16: Hopper variants, other backends, activations quantized before.

    "hopper" among the variants is the configuration that the kernel itself chooses for the size. For int8 and fp8 there
    is also that one with the quantization of its activations from bf16, beside the dense product with the same.
    """
    from tritflow.kernels import quantize_activation, w2a8_matmul, w2a16_linear
    from tritflow.kernels.hopper.launch import Config

    sets = input_sets(m * k + n * k // 4)
    dtype = activation_dtype(kind)
    q = [quantized(m, k, dtype) for _ in range(sets)]
    w = [pack(random_trits(n, k)) for _ in range(sets)]
    scale = torch.rand(n, device="cuda").to(torch.bfloat16)
    bias = torch.randn(n, device="cuda").to(torch.bfloat16)

    def product(config: Config | None) -> Callable[[int], Tensor]:
        return lambda i: hopper(*q[i], w[i], scale, bias, config=config)

    def named(backend: str) -> Callable[[int], Tensor]:
        if kind == "bf16":
            return lambda i: w2a16_linear(q[i][0], w[i], scale, bias, backend=backend)
        return lambda i: w2a8_matmul(*q[i], w[i], scale, torch.bfloat16, bias, backend=backend)

    found = [
        Candidate(f"{kind} {v}", product(None if v == "hopper" else Config(**VARIANTS[v])), sets) for v in variants
    ]
    found += [Candidate(f"{kind} {backend}", named(backend), sets) for backend in backends]
    if "hopper" in variants and kind != "bf16":
        name = str(dtype).removeprefix("torch.")
        few = max(2, sets // 2)
        x = [torch.randn(m, k, device="cuda").to(torch.bfloat16) for _ in range(few)]

        def quantized_too(i: int) -> Tensor:
            return hopper(*quantize_activation(x[i], None, name), w[i], scale, bias)

        found.append(Candidate(f"{kind} hopper + quantize", quantized_too, few))
        if kind == "fp8":
            dense = [quantized(n, k, dtype) for _ in range(few)]

            def rival(i: int) -> Tensor:
                xq, sx = quantize_activation(x[i], None, name)
                v, sv = dense[i]
                return torch._scaled_mm(
                    xq, v.t(), sx[:, None], sv[None, :], bias, out_dtype=torch.bfloat16, use_fast_accum=True
                )

            found.append(Candidate("fp8 row gauss fast + quantize", rival, few))
    return found


def skinny(m: int, n: int, k: int) -> list[Candidate]:
    """Few rows of bf16 activations: the dense bf16 product, and where it applies the skinny kernel's settings.

    For one row also what the same grid takes to read the weights, and to do nothing, on the same weights in turn.
    """
    from tritflow.kernels import w2a16_linear
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    sets = max(2, math.ceil(160e6 / (n * k / 4)))
    few = max(2, math.ceil(300e6 / (2 * n * k)))
    x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
    wb = [torch.randn(n, k, device="cuda").to(torch.bfloat16) for _ in range(few)]
    wp = [pack(random_trits(n, k)) for _ in range(sets)]
    scale = torch.rand(n, device="cuda").to(torch.bfloat16)
    found = [Candidate("bf16 gauss", lambda i: torch.nn.functional.linear(x, wb[i]), few)]

    found.append(Candidate("triton", lambda i: w2a16_linear(x, wp[i], scale, backend="triton"), sets))

    def product(settings: dict[str, Any]) -> Callable[[int], Tensor]:
        return lambda i: w2a16_skinny(x, wp[i], scale, **settings)

    if m <= 8:
        settings_ = {name: s for name, s in SKINNY.items() if m == 1 or "digits" not in s}
        found += [Candidate(f"skinny, {name}", product(settings), sets) for name, settings in settings_.items()]
    if m == 1:
        found += limits(wp)
    if m >= 64:
        found.append(Candidate("hopper", lambda i: hopper(x, scale, wp[i], scale), sets))
    return found


def limits(weights: list[Tensor]) -> list[Candidate]:
    """What no product with one row on these packed weights can undercut by much: see `LIMITS`."""
    from tritflow.kernels.hopper.limits import read_weights

    out = torch.zeros(weights[0].shape[0], dtype=torch.int32, device=weights[0].device)

    def limit(settings: dict[str, Any]) -> Callable[[int], Tensor]:
        return lambda i: read_weights(weights[i], out, **settings)

    return [Candidate(f"limit, {name}", limit(settings), len(weights)) for name, settings in LIMITS.items()]
