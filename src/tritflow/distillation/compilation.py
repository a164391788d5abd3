"""A model's repeated blocks compiled while it trains, and as they were afterwards."""

from __future__ import annotations

from typing import Any

import torch


def compile_blocks_(model: Any, backend: str = "inductor") -> None:
    """Compile the forward pass of each repeated block of a diffusers model; what is compiled is shared between blocks.

    diffusers' `compile_repeated_blocks` compiles hooks too. Here they run outside, as those of offloaded latents must.

    Args:
        model: names its blocks' classes in `_repeated_blocks`.
        backend: as for `torch.compile`.
    """
    for block in _repeated(model):
        block.forward = torch.compile(block.forward, fullgraph=True, backend=backend)


def uncompile_(model: Any) -> None:
    """Let the blocks of `compile_blocks_` run uncompiled again."""
    for block in _repeated(model):
        vars(block).pop("forward", None)


def _repeated(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ in model._repeated_blocks]
