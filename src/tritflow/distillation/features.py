"""How far a student's hidden states are from its teacher's, block by block, as a further loss.

A velocity tells a student what its blocks together should have done; hidden states tell every block of its own (hints:
Romero et al., "FitNets", 2015; of diffusion models at 2 bits: Sui et al., "BitsFusion", 2024). Knows no model family:
blocks are called by name, and each returns a tensor or a tuple of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.distillation.losses import Measure

EPSILON = 1e-6
Seen = dict[str, tuple[Tensor, ...]]
"""What each block returned last, by its name."""


class _Tap(nn.Module):
    """A block that also keeps what it returned. It stands around the block, outside of what is compiled."""

    def __init__(self, block: nn.Module, name: str, seen: Seen) -> None:
        super().__init__()
        self.block, self.name, self.seen = block, name, seen

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.block(*args, **kwargs)
        self.seen[self.name] = out if isinstance(out, tuple) else (out,)
        return out


@contextmanager
def tapped(model: nn.Module, blocks: Sequence[str]) -> Iterator[Seen]:
    """What the named blocks of a model returned in its last forward pass. Parameters have other names meanwhile."""
    seen: Seen = {}
    inner = {name: model.get_submodule(name) for name in blocks}
    try:
        for name, block in inner.items():
            model.set_submodule(name, _Tap(block, name, seen))
        yield seen
    finally:
        for name, block in inner.items():
            model.set_submodule(name, block)


def distance(student: Seen, teacher: Seen) -> Tensor:
    """Mean square difference of hidden states [B, T, C], each channel in units of the teacher's own variance over batch
    and tokens, averaged over all that the blocks return: 0 for equal ones, 1 where the student knows but the mean."""
    errors = [
        ((s.float() - t.float()).square() / (t.float().var((0, 1), correction=0) + EPSILON)).mean()
        for name in teacher
        for s, t in zip(student[name], teacher[name], strict=True)
    ]
    return torch.stack(errors).mean()


def with_features(measure: Measure, student: Seen, teacher: Seen, weight: float) -> Measure:
    """`measure` plus `weight` times the distance of what both models' blocks returned just before."""

    def both(predicted: Tensor, target: Tensor, kwargs: Mapping[str, Tensor]) -> Tensor:
        return measure(predicted, target, kwargs) + weight * distance(student, teacher)

    return both
