"""FLUX.1 (dev, schnell and their finetunes): double blocks of two streams, then single blocks of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tritflow.formats.architecture import FLUX1 as CLASS_NAME
from tritflow.formats.architecture import Shape, flux1_shapes
from tritflow.models.family import BlockCalls, ChannelGroup
from tritflow.models.shaped import ShapedFamily

MODULATION = ("norm1.linear", "norm1_context.linear", "norm.linear")
"""Ends of the names of modulation layers inside the blocks."""


def is_modulation(name: str) -> bool:
    """Whether a module of a FLUX.1 transformer is one of the blocks' modulation layers."""
    return "transformer_blocks." in name and name.endswith(MODULATION)


class Flux1(ShapedFamily):
    """`FluxTransformer2DModel`. 14 linears a double block, 6 a single block: 494 in FLUX.1-dev."""

    name: ClassVar[str] = "flux1"
    transformer_class: ClassVar[str] = CLASS_NAME
    targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*", "single_transformer_blocks.*")
    block_calls: ClassVar[BlockCalls | None] = BlockCalls(
        streams=("encoder_hidden_states", "hidden_states"), per_sample=("temb",), final=("hidden_states",)
    )

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `ShapedFamily.shapes`."""
        return flux1_shapes(config)

    def stream_of(self, linear: str) -> str:
        """See `Family.stream_of`: modulation sees one row a picture, single blocks text and image together."""
        leaf = linear.split(".", 2)[2]
        if leaf.startswith("norm"):
            return "condition"
        if linear.startswith("single_transformer_blocks."):
            return "all"
        return "text" if leaf.startswith(("attn.add_", "attn.to_add_out", "ff_context.")) else "image"

    def channel_groups(self, config: Mapping[str, Any]) -> list[ChannelGroup]:
        """See `Family.channel_groups`: inputs of q, k, v and of the MLPs (through the modulation), and values.

        Queries and keys pass an RMSNorm and the MLPs' hidden channels a GELU; neither lets a factor through.
        """
        groups = []
        for block in self.block_order(config):
            make = _double_groups if block.startswith("transformer_blocks.") else _single_groups
            groups += make(block, self.block_linears(config)[f"{block}.attn.to_v"][0])
        return groups


# Rows of a modulation linear, in pieces of the hidden size: shift, scale and gate of attention, then of the MLP.
_ATTENTION, _MLP = (0, 1), (3, 4)


def _double_groups(block: str, hidden: int) -> list[ChannelGroup]:
    def modulated(norm: str, part: tuple[int, int], readers: tuple[str, ...]) -> ChannelGroup:
        linear = f"{block}.{norm}.linear"
        return ChannelGroup(
            name=f"{block}.{readers[0]}",
            channels=hidden,
            rows=((linear, part[0] * hidden),),
            gains=((linear, part[1] * hidden),),
            columns=tuple((f"{block}.{reader}", 0) for reader in readers),
        )

    return [
        modulated("norm1", _ATTENTION, ("attn.to_q", "attn.to_k", "attn.to_v")),
        modulated("norm1_context", _ATTENTION, ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        # Attention mixes the values of both streams, channel by channel: they share their factors.
        ChannelGroup(
            name=f"{block}.attn.to_out.0",
            channels=hidden,
            rows=((f"{block}.attn.to_v", 0), (f"{block}.attn.add_v_proj", 0)),
            gains=(),
            columns=((f"{block}.attn.to_out.0", 0), (f"{block}.attn.to_add_out", 0)),
        ),
        modulated("norm1", _MLP, ("ff.net.0.proj",)),
        modulated("norm1_context", _MLP, ("ff_context.net.0.proj",)),
    ]


def _single_groups(block: str, hidden: int) -> list[ChannelGroup]:
    readers = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
    return [
        ChannelGroup(
            name=f"{block}.{readers[0]}",
            channels=hidden,
            rows=((f"{block}.norm.linear", 0),),
            gains=((f"{block}.norm.linear", hidden),),
            columns=tuple((f"{block}.{reader}", 0) for reader in readers),
        ),
        # proj_out reads the attention's output first, then the MLP's.
        ChannelGroup(
            name=f"{block}.proj_out",
            channels=hidden,
            rows=((f"{block}.attn.to_v", 0),),
            gains=(),
            columns=((f"{block}.proj_out", 0),),
        ),
    ]


FLUX1 = Flux1()
