"""Host side of 8-bit attention on Hopper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tritflow.kernels import tuning
from tritflow.kernels.attention_reference import BLOCK
from tritflow.kernels.hopper.attention import attention_kernel
from tritflow.kernels.reference import AMAX_FLOOR, QMAX
from tritflow.kernels.triton.attention_inputs import Quantized, logit_factor, normed_quantize, quantize
from tritflow.kernels.triton.block import contiguous_features


@dataclass(frozen=True)
class AttentionConfig:
    """One way to run the kernel.

    Attributes:
        consumers: warpgroups of 64 queries a block, 2 or 3.
        stages: of `keys` keys and values in shared memory.
        keys: of a tile, 64 or 128.
        ahead: multiply queries with the next tile's keys while this tile's weights are made.
        half: make weights in packed fp16, and add them up in it.
        skip: leave out the multiplication of sums with a tile's factor where that is 1 for all rows of a warp.
    """

    consumers: int = 2
    stages: int = 3
    ahead: bool = True
    keys: int = 128
    half: bool = False
    skip: bool = False

    def __post_init__(self) -> None:
        if self.skip and self.ahead:
            raise ValueError("skip=True needs ahead=False: there are not enough registers for both")

    @property
    def name(self) -> str:
        words = [f"{self.consumers} consumers", f"{self.keys} keys", f"{self.stages} stages"]
        return ", ".join([*words, *(name for name in ("ahead", "half", "skip") if getattr(self, name))])


def query_max(dtype: str, config: AttentionConfig) -> float:
    """The largest magnitude that queries are scaled to: read as fp16 no product with keys of 448 may pass 65,504."""
    return 1.0 if config.half and dtype != "int8" else QMAX[dtype]  # 448 * 128 features


def tuned_config(q: Tensor, dtype: str) -> AttentionConfig:
    """The configuration that was fastest for queries [B, S, H, D] on this GPU, or the fixed one."""
    batch, tokens, heads, features = q.shape
    choice = tuning.lookup(q.device, tuning.attention(dtype), tokens, batch * heads, features)
    return AttentionConfig() if choice is None or choice.backend != "hopper" else AttentionConfig(**choice.config)


def constants(tokens: int, dtype: str, config: AttentionConfig) -> dict[str, Any]:
    """The kernel's constants for inputs of [B, tokens, H, D] and a `dtype` of queries and keys."""
    return {
        "S": tokens,
        "PADDED": triton.cdiv(tokens, BLOCK) * BLOCK,
        "STAGES": config.stages,
        "BLOCK": BLOCK,
        "QMAX": query_max(dtype, config),
        "FLOOR": AMAX_FLOOR,
        "CONSUMERS": config.consumers,
        "AHEAD": config.ahead,
        "HALF": config.half,
        "SKIP": config.skip,
    }


def attend(
    q: Tensor, quantized: Quantized, scale: float | None = None, config: AttentionConfig | None = None
) -> Tensor:
    """Attention of q [B, S, H, D], D contiguous, 64 or 128, on keys and values that `quantize` gave.

    Where that holds queries, too (scaled to at most `query_max`), q gives shape and dtype alone.
    """
    batch, tokens, heads, features = q.shape
    k8, v8 = quantized.k8, quantized.v8
    if v8 is None or quantized.v_exponent is None:
        raise ValueError("Hopper's attention takes values in e4m3")
    dtype, element = ("int8", gl.int8) if k8.dtype == torch.int8 else ("float8_e4m3fn", gl.float8e4nv)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # contiguous, whatever q is
    config = config or tuned_config(q, dtype)
    k_block, v_block = [config.keys, features], [features, config.keys]
    swizzled = gl.NVMMASharedLayout.get_default_for
    attention_kernel[(triton.cdiv(tokens, 64 * config.consumers), batch * heads)](
        q if quantized.q8 is None else quantized.q8,
        TensorDescriptor(k8, list(k8.shape), [features, 1], k_block, swizzled(k_block, element)),
        TensorDescriptor(v8, list(v8.shape), [v8.shape[1], 1], v_block, swizzled(v_block, gl.float8e4nv)),
        quantized.k_scale if quantized.q_scale is None else quantized.q_scale,
        quantized.k_scale,
        quantized.v_exponent,
        out,
        logit_factor(features, scale),
        *q.stride()[:3],
        *out.stride()[:3],
        heads,
        **constants(tokens, dtype, config),
        num_warps=4,
    )
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, dtype: str = "int8", scale: float | None = None) -> Tensor:
    """See `tritflow.kernels.attention`."""
    if not q.numel():
        return torch.empty(q.shape, dtype=q.dtype, device=q.device)
    q, k, v = (contiguous_features(t) for t in (q, k, v))
    return attend(q, quantize(None, k, v, dtype), scale)


def normed_attention(q: Tensor, k: Tensor, v: Tensor, *rest: Any, config: AttentionConfig | None = None) -> Tensor:
    """See `tritflow.kernels.normed_attention`, its arguments in its order."""
    context, dtype = rest[4], rest[10]
    tokens = q.shape[1] + (0 if context is None else context.shape[1])
    like = q.new_empty(()).expand(q.shape[0], tokens, *q.shape[2:])
    if not like.numel():
        return q.new_empty(like.shape)
    config = config or tuned_config(like, dtype)
    return attend(like, normed_quantize(q, k, v, *rest, query_max=query_max(dtype, config)), config=config)
