"""What every model family states, and what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar


class FamilyError(ValueError):
    """A model is of no known family, or its config or tensors do not fit the family."""


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of one activation that can be rescaled, all that makes and all that reads them told, at no change.

    Multiply what makes channel c by s, divide what reads it by s, and the model computes the same. Parts of linears
    are named as (linear, first row or column); each part is `channels` long.

    Attributes:
        name: unique in the model.
        channels: how many.
        rows: output rows (weight and bias) that make the channels, or are added to them.
        gains: output rows g that enter as x * (1 + g), with x made by nobody in the group (a norm's output): to
            multiply by s, g becomes s g + s - 1.
        columns: input columns that read the channels.
    """

    name: str
    channels: int
    rows: tuple[tuple[str, int], ...]
    gains: tuple[tuple[str, int], ...]
    columns: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class BlockCalls:
    """How blocks call each other, for whoever runs them one by one. Names are keyword arguments of their `forward`.

    Attributes:
        streams: what a block returns, in order, each under the name by which the next block takes it; [B, ...].
        per_sample: arguments that differ from sample to sample and not from block to block; [B, ...]. All arguments
            that are in neither list are shared by samples and blocks.
        final: the streams that are read after the last block.
    """

    streams: tuple[str, ...]
    per_sample: tuple[str, ...]
    final: tuple[str, ...]


class Family(ABC):
    """One family of transformers: names and shapes only, no model is built.

    Attributes:
        name: as written in configs and results.
        transformer_class: the diffusers class.
        targets: `fnmatch` patterns of the modules that are ternary by default.
        block_calls: see `BlockCalls`; None where blocks do not call each other alike.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]
    block_calls: ClassVar[BlockCalls | None] = None

    @abstractmethod
    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise `FamilyError` unless `config` (a diffusers config.json) is one of this family's."""

    @abstractmethod
    def block_order(self, config: Mapping[str, Any]) -> list[str]:
        """Module names of the blocks in the order in which they run."""

    @abstractmethod
    def block_linears(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Every linear inside the blocks: name -> (out_features, in_features), in block order."""

    def stream_of(self, linear: str) -> str:
        """Which stream of tokens a block linear works on, for reports: `image`, `text`, `condition` or `all`."""
        return "all"

    def channel_groups(self, config: Mapping[str, Any]) -> list[ChannelGroup]:
        """Every group of channels inside the blocks that can be rescaled without changing what the model computes.

        Raises:
            FamilyError: nobody has written them down for this family.
        """
        raise FamilyError(f"which channels of {self.name} can be rescaled is not known; flux1's are")

    @abstractmethod
    def check_tensors(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check a dense checkpoint's tensors (name -> shape, diffusers names) before any work starts.

        Raises:
            FamilyError: names the first tensor that is missing, unknown or of another shape than `config` asks.
        """
