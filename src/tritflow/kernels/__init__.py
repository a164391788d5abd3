"""Ternary kernels: registered operations, backend choice, and the plain reference. See ops.py for numerics."""

from tritflow.kernels.backends import Backend, BackendError, Kernel, describe
from tritflow.kernels.ops import quantize_activation, w2a8_linear, w2a16_linear

__all__ = [
    "Backend",
    "BackendError",
    "Kernel",
    "describe",
    "quantize_activation",
    "w2a8_linear",
    "w2a16_linear",
]
