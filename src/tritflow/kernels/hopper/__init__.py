"""Ternary matrix products for Hopper GPUs (compute capability 9.0), written in Gluon, Triton's lower-level language.

Importing this package is safe anywhere: Gluon is imported when a kernel is first used. Gluon's interface moves
between Triton releases, so ``why_not`` names the releases that were tried and everything else falls back.
"""

from __future__ import annotations

from functools import cache

import torch

TRITON_VERSIONS = ("3.6",)


@cache
def why_not(device_index: int = 0) -> str | None:
    """Why these kernels cannot run on a CUDA device, in one line; None if they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if torch.cuda.get_device_capability(device_index) != (9, 0):
        return f"{torch.cuda.get_device_name(device_index)} is no Hopper GPU (compute capability 9.0)"
    return why_not_compile()


@cache
def why_not_compile() -> str | None:
    """Why the installed Triton cannot compile these kernels (no GPU needed); None if it can."""
    try:
        import triton
    except ImportError:
        return "Triton is not installed"
    if not triton.__version__.startswith(tuple(f"{v}." for v in TRITON_VERSIONS)):
        return f"Triton {triton.__version__} is not one of the releases tried ({', '.join(TRITON_VERSIONS)})"
    try:
        import triton.experimental.gluon
    except ImportError:
        return f"Triton {triton.__version__} comes without Gluon"
    return None


def supports(m: int, n: int, k: int) -> bool:
    """Whether a product of [m, k] activations with [n, k] trits has sizes that the copy engine takes."""
    return m > 0 and n % 8 == 0 and k % 16 == 0


__all__ = ["TRITON_VERSIONS", "supports", "why_not", "why_not_compile"]
