"""gemlite's ternary products as rivals, where gemlite is installed.

Its activations are quantized beforehand, as ours are: `A8W158_INT_dynamic` would do that in the call, so its kernel is
called as `gemlite.core.forward_functional` does after quantizing. gemlite tunes itself on first use of a shape.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from tritflow.profiling.products import activation_dtype, hopper, input_sets, pack, quantized, random_trits
from tritflow.profiling.timing import Candidate

KINDS = ("int8", "bf16")
"""Activations that gemlite takes with ternary weights."""


def installed() -> bool:
    return find_spec("gemlite") is not None


def product(trits: Tensor, kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    """gemlite's product of ternary weights [N, K] (int8) with activations [M, K] and their scales fp32 [M]."""
    from gemlite import core, helper

    maker = helper.A8W158_INT_dynamic if kind == "int8" else helper.A16W158_INT
    layer = maker(device="cuda:0", dtype=torch.bfloat16).from_weights(
        trits.to(torch.bfloat16), torch.tensor(0.5, device=trits.device)
    )
    tensors, meta = layer.get_tensor_args(), layer.get_meta_args()
    bits, input_dtype = meta[1], meta[5]
    if kind != "int8":
        input_dtype = core.DType.FP16.value  # how gemlite itself names both 16-bit types when it tunes

    def run(x: Tensor, scale: Tensor) -> Tensor:
        kernel = core.GEMLITE_TRITON_MAPPING[core.get_matmul_type(x.shape[0], bits, False)]
        scales = scale[:, None] if kind == "int8" else None
        out: Tensor = kernel.forward(
            x, *tensors[:3], scales, *meta[1:-1], bool(bits), input_dtype * 100 + bits, meta_scale=0.0
        )
        return out

    return run


def candidates(m: int, n: int, k: int, kind: str) -> tuple[list[Candidate], float]:
    """gemlite's product and ours of one shape, and gemlite's relative error; a row scale of .5 each."""
    from tritflow.kernels import w2a16_linear

    sets = input_sets(m * k + n * k // 4)
    q = [quantized(m, k, activation_dtype(kind)) for _ in range(sets)]
    trits = [random_trits(n, k) for _ in range(sets)]
    theirs = [product(t, kind) for t in trits]
    w = [pack(t) for t in trits]
    row = torch.full((n,), 0.5, device="cuda", dtype=torch.bfloat16)
    truth = (q[0][0].double() @ trits[0].double().T) * q[0][1].double()[:, None] * 0.5
    found = theirs[0](*q[0]).double()
    error = ((found - truth).norm() / truth.norm()).item()

    def ours(i: int) -> Tensor:
        if kind == "bf16" and m < 64:
            return w2a16_linear(q[i][0], w[i], row)
        return hopper(*q[i], w[i], row)

    return [
        Candidate(f"{kind} gemlite", lambda i: theirs[i](*q[i]), sets),
        Candidate(f"{kind} tritflow", ours, sets),
    ], error


def warm(m: int, n: int, k: int, kind: str) -> dict[str, Any]:
    """Compile what gemlite chooses between; Triton's cache keeps it for other processes."""
    trits = random_trits(n, k)
    product(trits, kind)(*quantized(m, k, activation_dtype(kind)))
    torch.cuda.synchronize()
    return {}
