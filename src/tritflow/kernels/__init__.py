"""Ternary kernels: registered operations, backend choice, and the plain reference. See ops.py for numerics."""

from tritflow.kernels.attention_op import attention, normed_attention
from tritflow.kernels.backends import Backend, BackendError, Kernel, describe
from tritflow.kernels.block_ops import (
    adaln,
    adaln_quantize,
    gated_residual,
    gelu,
    gelu_quantize,
    qk_norm_rope,
)
from tritflow.kernels.low_rank_op import low_rank_add_, low_rank_down, w2a16_low_rank
from tritflow.kernels.matmul_op import w2a8_matmul
from tritflow.kernels.ops import quantize_activation, w2a8_linear, w2a16_linear

__all__ = [
    "Backend",
    "BackendError",
    "Kernel",
    "adaln",
    "adaln_quantize",
    "attention",
    "describe",
    "gated_residual",
    "gelu",
    "gelu_quantize",
    "low_rank_add_",
    "low_rank_down",
    "normed_attention",
    "qk_norm_rope",
    "quantize_activation",
    "w2a8_linear",
    "w2a8_matmul",
    "w2a16_linear",
    "w2a16_low_rank",
]
