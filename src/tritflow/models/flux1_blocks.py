"""FLUX.1's two kinds of block over fused operations: one kernel between two products.

Between products there is layer norm + modulation + quantization, RMS norm + rotation, GELU + quantization, or a gated
residual. Query, key and value are one product, which shares its quantized input with the MLP of a single block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.config import nearest
from tritflow.kernels import attention as attention_8bit
from tritflow.kernels import normed_attention, qk_norm_rope
from tritflow.models.beside import beside
from tritflow.models.fused import Activated, Modulated, Projection, Rows, share_low_rank_

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries, keys and values [B, S, H, D] to [B, S, H, D]."""


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention on [B, S, H, D]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    return out.transpose(1, 2)


def attend_int8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`tritflow.kernels.attention` with int8 queries and keys."""
    return attention_8bit(q, k, v)


def attend_fp8(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`tritflow.kernels.attention` with e4m3 queries and keys."""
    return attention_8bit(q, k, v, "float8_e4m3fn")


ATTENTIONS: dict[str, Attend] = {"16bit": attend, "int8": attend_int8, "fp8": attend_fp8}
"""Attention by name; the 8-bit ones err by some percent where 16 bits err by some tenths of one."""


IN_8_BITS: dict[Attend, str] = {attend_int8: "int8", attend_fp8: "float8_e4m3fn"}
"""Attentions that norm and turn queries and keys in the pass that quantizes them, and the dtype they quantize to."""


def named_attention(choice: str | Attend) -> Attend:
    """A function as it is, a name of `ATTENTIONS` as its function.

    Raises:
        ValueError: an unknown name.
    """
    if not isinstance(choice, str):
        return choice
    if choice not in ATTENTIONS:
        hint = nearest(choice, list(ATTENTIONS))
        raise ValueError(f"unknown attention '{choice}'{hint}: use one of {', '.join(ATTENTIONS)}, or a function")
    return ATTENTIONS[choice]


@dataclass
class Stream:
    """Image or text half of a double block."""

    qkv: Projection
    out: Projection
    up: Projection
    down: Projection
    norm_q: nn.RMSNorm
    norm_k: nn.RMSNorm
    heads: int
    eps: tuple[float, float]

    def attention_inputs(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value [B, S, H, D], neither normed nor turned."""
        return _three(self.qkv(Modulated(x, shift, scale, self.eps[0])), self.heads)

    def finish(self, x: Tensor, attention: Tensor, modulation: tuple[Tensor, ...]) -> Tensor:
        """Output projection and MLP, both with gated residual."""
        _, _, gate, shift, scale, mlp_gate = modulation
        x = self.out(Rows(attention), x, gate)
        return self.down(Activated(self.up(Modulated(x, shift, scale, self.eps[1])), once=True), x, mlp_gate)


def _three(qkv: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
    return q, k, v


def _join(text: Tensor, image: Tensor) -> Tensor:
    """`torch.cat` along tokens, by eight bytes at a time: of strided 16-bit numbers it copies one after the other."""
    if torch.compiler.is_compiling() or text.shape[-1] * text.element_size() % 8:
        return torch.cat([text, image], dim=1)
    if text.storage_offset() % 4 or image.storage_offset() % 4:
        return torch.cat([text, image], dim=1)
    return torch.cat([text.view(torch.float64), image.view(torch.float64)], dim=1).view(text.dtype)


def _eps(norm: nn.RMSNorm) -> float:
    return 1e-6 if norm.eps is None else norm.eps


@dataclass
class Rope:
    """Rotation tables [text + image tokens, head dimension], float32; of half the width for those of `IN_8_BITS`."""

    cos: Tensor
    sin: Tensor

    def for_(self, attention: Attend) -> Rope:
        """What an attention reads; both numbers of a pair are turned by the same angle."""
        if attention not in IN_8_BITS:
            return Rope(self.cos.contiguous(), self.sin.contiguous())
        return Rope(self.cos[:, ::2].contiguous(), self.sin[:, ::2].contiguous())


Inputs = tuple[Tensor, Tensor, Tensor]
"""Query, key and value [B, S, H, D], neither normed nor turned."""


def _joint_attention(
    attention: Attend, rope: Rope, own: Inputs, norms: tuple[Any, Any], text: Inputs | None = None, text_norms: Any = ()
) -> Tensor:
    """Norm, rotation and attention of one stream, or of text and another: [B, T + S, H D]."""
    (q, k, v), eps = own, _eps(norms[0])
    weights, text_weights = [norm.weight for norm in norms], [norm.weight for norm in text_norms]
    if attention in IN_8_BITS:
        context = (None,) * 5 if text is None else (*text, *text_weights)
        args: tuple[Any, ...] = (q, k, v, *weights, rope.cos, rope.sin, *context, eps, IN_8_BITS[attention])
        out = normed_attention(*args)
    else:
        before = (None,) * 4 if text is None else (*text[:2], *text_weights)
        args = (q, k, *weights, rope.cos, rope.sin, *before, eps)
        q, k = qk_norm_rope(*args)
        out = attention(q, k, v if text is None else _join(text[2], v))
    return out.flatten(2)


class DoubleBlock:
    """The fused `FluxTransformerBlock`.

    Args:
        block: diffusers' block; its projections' tensors become views of joint ones.
        attention: see `Attend`.
    """

    def __init__(self, block: Any, attention: Attend = attend) -> None:
        attn = block.attn
        self.attention = attention
        self.image = Stream(
            Projection(attn.to_q, attn.to_k, attn.to_v),
            Projection(attn.to_out[0]),
            Projection(block.ff.net[0].proj),
            Projection(block.ff.net[2]),
            attn.norm_q,
            attn.norm_k,
            attn.heads,
            (block.norm1.norm.eps, block.norm2.eps),
        )
        self.text = Stream(
            Projection(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj),
            Projection(attn.to_add_out),
            Projection(block.ff_context.net[0].proj),
            Projection(block.ff_context.net[2]),
            attn.norm_added_q,
            attn.norm_added_k,
            attn.heads,
            (block.norm1_context.norm.eps, block.norm2_context.eps),
        )

    def __call__(
        self, image: Tensor, text: Tensor, image_modulation: Tensor, text_modulation: Tensor, rope: Rope
    ) -> tuple[Tensor, Tensor]:
        """(image [B, S, D], text [B, T, D]) to the same; modulations are [B, 6 D]."""
        image_parts, text_parts = image_modulation.chunk(6, dim=1), text_modulation.chunk(6, dim=1)
        text_inputs, inputs = beside(
            lambda: self.text.attention_inputs(text, *text_parts[:2]),
            lambda: self.image.attention_inputs(image, *image_parts[:2]),
        )
        norms, text_norms = ((stream.norm_q, stream.norm_k) for stream in (self.image, self.text))
        attention = _joint_attention(self.attention, rope, inputs, norms, text_inputs, text_norms)
        del inputs, text_inputs
        tokens = text.shape[1]
        text, image = beside(
            lambda: self.text.finish(text, attention[:, :tokens], text_parts),
            lambda: self.image.finish(image, attention[:, tokens:], image_parts),
        )
        return image, _clip(text)


class SingleBlock:
    """The fused `FluxSingleTransformerBlock`, on text and image as one tensor.

    Args:
        block: diffusers' block; its projections' tensors become views of joint ones.
        attention: see `Attend`.
    """

    def __init__(self, block: Any, attention: Attend = attend) -> None:
        attn = block.attn
        self.attention = attention
        self.qkv = Projection(attn.to_q, attn.to_k, attn.to_v)
        self.up = Projection(block.proj_mlp)
        share_low_rank_(self.qkv, self.up)
        self.out = Projection(block.proj_out)
        self.norm_q, self.norm_k, self.heads = attn.norm_q, attn.norm_k, attn.heads
        self.eps: float = block.norm.norm.eps

    def __call__(self, x: Tensor, modulation: Tensor, rope: Rope) -> Tensor:
        """[B, T + S, D] to the same; modulation is [B, 3 D]."""
        shift, scale, gate = modulation.chunk(3, dim=1)
        rows = Modulated(x, shift, scale, self.eps)
        norms = (self.norm_q, self.norm_k)
        attention = _joint_attention(self.attention, rope, _three(self.qkv(rows), self.heads), norms)
        # The MLP's wide output comes after attention, so that the two are not in memory together.
        hidden = Activated(self.up(rows), attention, once=True)
        del rows, attention
        return _clip(self.out(hidden, x, gate))


def _clip(x: Tensor) -> Tensor:
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
