"""FLUX.1's attention while a student trains: one product for query, key and value, and a rotation that compiles well.

What it computes is what diffusers' own processor computes. Three products of one input read it three times, and so do
their gradients; and of the rotation's `unbind` and `stack` the compiler makes kernels that load everything twice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor, nn

from tritflow.modules.fake import FakeTernaryLinear


class TrainingAttention:
    """An attention processor for `FluxAttention`, in place of `FluxAttnProcessor` (without masks).

    Called with [B, T, C] states and, in double blocks, [B, S, C] text states; returns the same, text last.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Any:
        heads = (-1, attn.head_dim)
        query, key, value = (x.unflatten(-1, heads) for x in joined((attn.to_q, attn.to_k, attn.to_v), hidden_states))
        query, key = attn.norm_q(query), attn.norm_k(key)
        if encoder_hidden_states is not None:
            added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            text_query, text_key, text_value = (x.unflatten(-1, heads) for x in joined(added, encoder_hidden_states))
            query = torch.cat([attn.norm_added_q(text_query), query], dim=1)
            key = torch.cat([attn.norm_added_k(text_key), key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query, key = rotated(query, *image_rotary_emb), rotated(key, *image_rotary_emb)
        out = dispatch_attention_fn(query, key, value, attn_mask=attention_mask).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return out
        length = encoder_hidden_states.shape[1]
        text, image = out[:, :length].contiguous(), out[:, length:].contiguous()
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text)


def joined(layers: Sequence[nn.Module], x: Tensor) -> Sequence[Tensor]:
    """What each of several linear layers makes of x [..., K], by one product where they are alike."""
    twins = [layer for layer in layers if isinstance(layer, FakeTernaryLinear) and layer.plain]
    weights: list[Tensor]
    if len(twins) == len(layers):
        weights = [twin.effective_weight() for twin in twins]
    elif all(type(layer) is nn.Linear for layer in layers):
        weights = [layer.weight for layer in layers]  # type: ignore[misc]
    else:
        return [layer(x) for layer in layers]
    biases: list[Any] = [layer.bias for layer in layers]
    if any(bias is None for bias in biases):
        return [layer(x) for layer in layers]
    out = F.linear(x, torch.cat(weights).to(x.dtype), torch.cat(biases).to(x.dtype))
    return out.split([len(weight) for weight in weights], dim=-1)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, T, H, D], its pairs of neighbours rotated (Su et al., 2021, in FLUX's order); cos and sin are [T, D]."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    first = torch.arange(sin.shape[-1], device=sin.device) % 2 == 0
    signed = torch.where(first, -sin, sin)
    return (x.float() * cos[:, None] + swapped.float() * signed[:, None]).to(x.dtype)


@contextmanager
def training_forward(*models: nn.Module) -> Iterator[None]:
    """Let FLUX.1 models attend by `TrainingAttention`; other models and other processors stay as they are."""
    changed: list[Any] = [
        module
        for model in models
        for module in model.modules()
        if isinstance(module, FluxAttention) and type(module.processor) is FluxAttnProcessor
    ]
    before = [module.processor for module in changed]
    try:
        for module in changed:
            module.processor = TrainingAttention()
        yield
    finally:
        for module, processor in zip(changed, before, strict=True):
            module.processor = processor
