"""Modulation up front: shift, scale and gate of every block for all steps of a generation, before the first one.

Modulation layers hold 27 % of FLUX.1-dev's weights and see one row per image and step, which depends on timestep,
guidance and pooled text alone. So one product per layer serves a whole generation, and the layers need not be on
the GPU meanwhile: with `offload` they stay in host memory and pass through the GPU one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.kernels import w2a8_linear, w2a16_linear
from tritflow.models.low_rank import base_of, factors, version
from tritflow.modules import TernaryLinear

Embed = Callable[[Tensor, Tensor | None, Tensor], Tensor]
"""(timestep [M], guidance [M] or None, pooled [M, P]) to the conditioning vector [M, D], as the model calls it."""

_KEPT = 2  # conditionings at a time: with and without the prompt, for true classifier-free guidance


def apply_elsewhere(linear: Any, x: Tensor) -> Tensor:
    """`linear(x)` on x's device, wherever the layer's tensors are; copies of them live for the call.

    Args:
        linear: a linear layer, or peft's LoRA layer around one.
        x: [..., K].
    """
    if linear.weight.device == x.device:
        out: Tensor = linear(x)
        return out

    out = _base_elsewhere(base_of(linear), x)
    for down, up, scaling in factors(linear):
        low = F.linear(x, _here(down, x).to(x.dtype))
        out = out + F.linear(low, _here(up, x).to(x.dtype)) * scaling
    return out


def _here(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor.detach().to(x.device, non_blocking=True)


def _base_elsewhere(linear: nn.Linear, x: Tensor) -> Tensor:
    def here(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _here(tensor, x)

    weight, bias = here(linear.weight), here(linear.bias)
    assert weight is not None
    if not isinstance(linear, TernaryLinear):
        return F.linear(x, weight, bias)
    scale, columns = here(linear.weight_scale), here(linear.input_scale)
    assert scale is not None
    if linear.mode == "w2a8":
        return w2a8_linear(x, weight, scale, bias, columns, linear.activation_dtype, linear.backend)
    return w2a16_linear(x, weight, scale, bias, columns, linear.backend)


class _Table(NamedTuple):
    """Modulation of some timesteps under one conditioning."""

    pooled: Tensor
    guidance: Tensor | None
    versions: tuple[int, int]
    dtype: torch.dtype
    step_of: dict[float, int]
    rows: Tensor  # [steps, B, features of all layers]

    def is_for(self, guidance: Tensor | None, pooled: Tensor, dtype: torch.dtype) -> bool:
        same = self.pooled is pooled and self.guidance is guidance and self.dtype == dtype
        return same and self.versions == _versions(guidance, pooled)


def _versions(guidance: Tensor | None, pooled: Tensor) -> tuple[int, int]:
    return version(pooled), -1 if guidance is None else version(guidance)


class Modulation:
    """All modulation layers of a model as one function of (timestep, guidance, pooled).

    Args:
        linears: linear layers, or peft's LoRA layers around them, in the order in which `rows` puts their outputs
            next to each other.
        embed: the model's conditioning embedder.
    """

    def __init__(self, linears: Sequence[Any], embed: Embed) -> None:
        self.linears = list(linears)
        self.features = [linear.out_features for linear in linears]
        self.embed = embed
        self._tables: list[_Table] = []

    def forget(self) -> None:
        """Drop all tables."""
        self._tables.clear()

    def compute(self, timestep: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """[M, features of all layers] in pooled.dtype, for timestep [M], guidance [M] or None, pooled [M, P]."""
        conditioning = F.silu(self.embed(timestep, guidance, pooled))
        out = conditioning.new_empty((conditioning.shape[0], sum(self.features)))
        for linear, part in zip(self.linears, out.split(self.features, dim=1), strict=True):
            part.copy_(apply_elsewhere(linear, conditioning))
        return out

    def prepare(self, timesteps: Tensor, guidance: Tensor | None, pooled: Tensor) -> None:
        """Compute every step's modulation now; `rows` then looks it up.

        Args:
            timesteps: [T] as the model's forward gets them (0 to 1), in the model's dtype.
            guidance: [B] or None; the object that `rows` will be called with.
            pooled: [B, P]; likewise.
        """
        batch, steps = pooled.shape[0], timesteps.shape[0]
        repeated = None if guidance is None else guidance.repeat(steps)
        flat = self.compute(timesteps.repeat_interleave(batch), repeated, pooled.repeat(steps, 1))
        index = {value: i for i, value in enumerate(timesteps.tolist())}
        rows = flat.view(steps, batch, flat.shape[1])
        table = _Table(pooled, guidance, _versions(guidance, pooled), timesteps.dtype, index, rows)
        others = [t for t in self._tables if not t.is_for(guidance, pooled, timesteps.dtype)]
        self._tables = [*others[1 - _KEPT :], table]

    def rows(
        self,
        timestep: Tensor,
        guidance: Tensor | None,
        pooled: Tensor,
        schedule: Tensor | None = None,
    ) -> Tensor:
        """[B, features of all layers] for one step.

        Reads the timestep's value, which waits for the device once a step. A step that is not in the table is
        computed by itself; if `schedule` has it, the whole schedule is computed.

        Args:
            timestep: [B] as the model's forward gets it.
            guidance: [B] or None.
            pooled: [B, P].
            schedule: all timesteps of the generation, [T] in timestep.dtype, if known.
        """
        values = timestep.tolist()
        same = len(values) == pooled.shape[0] and len(set(values)) == 1
        for table in self._tables:
            if same and table.is_for(guidance, pooled, timestep.dtype) and values[0] in table.step_of:
                return table.rows[table.step_of[values[0]]]
        if same and schedule is not None and values[0] in schedule.tolist():
            self.prepare(schedule, guidance, pooled)
            return self.rows(timestep, guidance, pooled)
        return self.compute(timestep, guidance, pooled)

    def split(self, rows: Tensor) -> list[Tensor]:
        """One view a layer."""
        return list(rows.split(self.features, dim=1))

    def offload_(self) -> int:
        """Move the layers to host memory (pinned, where CUDA is); returns the bytes that left the device."""
        moved = 0
        for linear in self.linears:
            tensors = (*linear.parameters(), *linear.buffers())
            moved += sum(t.nbytes for t in tensors if t.device.type != "cpu")
            base = base_of(linear)
            if isinstance(base, TernaryLinear) and torch.cuda.is_available() and not base.packed.is_pinned():
                # Right into pinned memory, wherever it comes from: pageable memory in between would be a second copy.
                packed = torch.empty(base.packed.shape, dtype=torch.uint8, pin_memory=True)
                base.set_packed_(packed.copy_(base.packed))
            if any(t.device.type != "cpu" for t in tensors):
                linear.to("cpu")
        return moved

    def restore_(self, device: torch.device) -> None:
        """Move the layers to `device` and drop all tables."""
        self.forget()
        for linear in self.linears:
            linear.to(device)
