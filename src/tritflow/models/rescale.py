"""Rescale channels inside a model without changing what it computes: one tensor at a time, any family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from tritflow.models.family import ChannelGroup


class Rescaling:
    """Factors a channel, spread over the tensors that make and read the channels.

    Args:
        groups: of the model's family.
        factors: by group name, positive [channels]; groups that are not named stay as they are.

    Raises:
        ValueError: an unknown group, or factors of another length or not above zero.
    """

    def __init__(self, groups: Iterable[ChannelGroup], factors: Mapping[str, Tensor]) -> None:
        known = {group.name: group for group in groups}
        self._rows: dict[str, list[tuple[int, Tensor, bool]]] = {}
        self._columns: dict[str, list[tuple[int, Tensor]]] = {}
        for name, given in factors.items():
            if name not in known:
                raise ValueError(f"the model has no group of channels '{name}'")
            group, s = known[name], given.double()
            if s.shape != (group.channels,) or not bool((s > 0).all()):
                raise ValueError(f"group '{name}' needs {group.channels} factors above zero")
            for linear, start in group.rows:
                self._rows.setdefault(linear, []).append((start, s, False))
            for linear, start in group.gains:
                self._rows.setdefault(linear, []).append((start, s, True))
            for linear, start in group.columns:
                self._columns.setdefault(linear, []).append((start, s))

    def changes(self, name: str) -> bool:
        """Whether `apply` does anything to the tensor called `name`."""
        linear, _, kind = name.rpartition(".")
        return linear in self._rows or (kind == "weight" and linear in self._columns)

    def apply(self, name: str, tensor: Tensor) -> Tensor:
        """The rescaled tensor in its own dtype, rounded once; `tensor` itself where nothing changes.

        Args:
            name: such as `transformer_blocks.0.attn.to_q.weight`.
            tensor: a linear's weight [N, K] or bias [N].
        """
        if not self.changes(name):
            return tensor
        linear, _, kind = name.rpartition(".")
        new = tensor.double()
        for start, s, gain in self._rows.get(linear, ()):
            part = new[start : start + len(s)]
            part *= s if kind == "bias" else s[:, None]
            if gain and kind == "bias":
                part += s - 1.0
        if kind == "weight":
            for start, s in self._columns.get(linear, ()):
                new[:, start : start + len(s)] /= s
        return new.to(tensor.dtype)


def outlier_factors(
    groups: Iterable[ChannelGroup], *, channels: int = 4, low: float = 50.0, high: float = 100.0, seed: int = 0
) -> dict[str, Tensor]:
    """Factors that plant outliers: in each group some channels, drawn without order, between `low` and `high`.

    Args:
        groups: of the model's family.
        channels: how many a group; the others keep factor 1.
        low, high: bounds; factors are spread evenly in their logarithm.
        seed: of the draw.

    Raises:
        ValueError: more channels than a group has, or bounds out of order or below 1.
    """
    if not 1.0 <= low <= high < math.inf:
        raise ValueError(f"factors must lie between 1 <= low <= high, not {low} and {high}")
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for group in groups:
        if not 0 < channels <= group.channels:
            raise ValueError(f"'{group.name}' has {group.channels} channels: {channels} of them cannot be outliers")
        s = torch.ones(group.channels, dtype=torch.float64)
        place = torch.randperm(group.channels, generator=generator)[:channels]
        share = torch.rand(channels, generator=generator, dtype=torch.float64)
        s[place] = low * (high / low) ** share
        found[group.name] = s
    return found
