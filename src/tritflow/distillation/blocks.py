"""A model as the stages see it that go through it block by block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tritflow.models.family import BlockCalls
from tritflow.modules.streamed import StreamedBlocks


@dataclass(frozen=True)
class Blocks:
    """The dense model, its blocks read when they run.

    Attributes:
        dense: the model's blocks in running order, with the original weights.
        run: called with a batch's kwargs; runs the model.
        linears: names of the linears that become ternary, each inside a block.
        calls: how blocks call each other.
    """

    dense: StreamedBlocks
    run: Callable[..., Any]
    linears: Sequence[str]
    calls: BlockCalls

    @property
    def model(self) -> nn.Module:
        return self.dense.model

    @property
    def order(self) -> list[str]:
        """Names of the blocks in running order."""
        return self.dense.names

    def inside(self, block: str) -> list[str]:
        """Ternary linears of a block."""
        return [name for name in self.linears if name.startswith(f"{block}.")]

    def leaves(self, block: str, module: nn.Module) -> dict[str, nn.Module]:
        """Ternary linears of a block by their full names, in `module`: the block itself or a copy."""
        return {name: module.get_submodule(name.removeprefix(f"{block}.")) for name in self.inside(block)}
