"""What flows through a model's blocks, kept for a set of samples, so that blocks can be run one by one.

Knows no model family: `BlockCalls` says which arguments of a block are streams, which belong to a sample, and all
others are shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Split, Trajectories
from tritflow.distillation.step import autocast
from tritflow.models.family import BlockCalls


class _Stop(Exception):
    """Raised before the first block runs: nothing behind it is wanted."""


@dataclass(frozen=True)
class Streams:
    """Inputs of one block for S samples. Tensors lie on `store`, batches come out on `device`; nothing is written to.

    Attributes:
        calls: how blocks are called.
        streams: name -> [S, ...].
        per_sample: name -> [S, ...].
        shared: everything else, on `device`.
        device: where blocks run.
        batch_size: samples run at once when a block is passed.
    """

    calls: BlockCalls
    streams: dict[str, Tensor]
    per_sample: dict[str, Tensor]
    shared: dict[str, Any]
    device: torch.device
    batch_size: int

    @property
    def samples(self) -> int:
        return next(iter(self.streams.values())).shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the streams."""
        return sum(t.nbytes for t in self.streams.values())

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        """Streams and per-sample arguments of the samples `indices` ([B], where the tensors are), on `device`."""
        return {n: take(t, indices, self.device) for n, t in {**self.streams, **self.per_sample}.items()}

    @torch.no_grad()
    def through(self, block: nn.Module) -> Streams:
        """The inputs of the next block: every sample passes `block`, which is on `device`."""
        new: dict[str, Tensor] = {}
        for rows in torch.arange(self.samples).split(self.batch_size):
            inputs = self.batch(rows.to(self._store))
            with autocast(self.device):
                out = call(block, self.calls, inputs, self.shared)
            for name, value in out.items():
                old = self.streams[name]
                if name not in new:
                    new[name] = torch.empty((self.samples, *value.shape[1:]), dtype=old.dtype, device=old.device)
                new[name][rows[0] : rows[-1] + 1] = value.to(old)
        return replace(self, streams=new)

    @property
    def _store(self) -> torch.device:
        return next(iter(self.streams.values())).device


def call(
    block: Callable[..., Any], calls: BlockCalls, inputs: Mapping[str, Tensor], shared: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Run one block; its outputs by the names under which the next block takes them."""
    out = block(**shared, **{name: inputs[name] for name in (*calls.streams, *calls.per_sample)})
    out = out if isinstance(out, tuple) else (out,)
    return dict(zip(calls.streams, out, strict=True))


def take(tensor: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    """Rows of a kept tensor on `device`, without waiting for the GPU."""
    rows = tensor[indices]
    if rows.device == device:
        return rows
    # Pinned memory is copied beside the computation, and kept by torch until the copy is done.
    return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)


@torch.no_grad()
def first_inputs(
    model: nn.Module,
    run: Callable[..., Any],
    block: str,
    calls: BlockCalls,
    trajectories: Trajectories,
    *,
    samples: int,
    batch_size: int,
    split: Split = "train",
    device: torch.device | str = "cpu",
    store: torch.device | str | None = None,
) -> Streams:
    """Run the model up to its first block and keep what that block is given.

    Args:
        model, run: `run(**kwargs)` runs `model` on a batch's kwargs.
        block: name of the first block.
        calls: how blocks are called.
        trajectories: `samples` pairs are drawn evenly from `split`.
        store: where tensors are kept; None: on `device`.

    Raises:
        ValueError: the block never ran, or was not given what `calls` names.
    """
    device = torch.device(device)
    kept: dict[str, list[Tensor]] = {name: [] for name in (*calls.streams, *calls.per_sample)}
    shared: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        missing = [name for name in kept if not isinstance(given.get(name), Tensor)]
        if missing:
            raise ValueError(f"'{block}' is not called with a tensor '{missing[0]}'; it takes {', '.join(given)}")
        for name, tensors in kept.items():
            tensors.append(given[name].to(device if store is None else store))
        shared.update({name: value for name, value in given.items() if name not in kept})
        raise _Stop

    handle = model.get_submodule(block).register_forward_pre_hook(hook, with_kwargs=True)
    size = trajectories.size(split)
    try:
        for indices in torch.linspace(0, size - 1, min(samples, size)).round().long().split(batch_size):
            try:
                run(**trajectories.pairs(indices, split, device).kwargs)
            except _Stop:
                continue
            raise ValueError(f"the model finished without running '{block}': check the block order")
    finally:
        handle.remove()
    whole = {name: torch.cat(tensors) for name, tensors in kept.items()}
    return Streams(
        calls,
        {name: whole[name] for name in calls.streams},
        {name: whole[name] for name in calls.per_sample},
        shared,
        device,
        batch_size,
    )


def relative_errors(
    blocks: Sequence[nn.Module],
    inputs: Streams,
    targets: Mapping[str, Tensor],
    weights: Mapping[str, Tensor],
) -> dict[str, float]:
    """Weighted mean square error of each stream behind `blocks`, over all samples; waits for the GPU once."""
    out = inputs
    for block in blocks:
        out = out.through(block)
    size = inputs.batch_size
    errors = [(_square_error(out.streams[n], t, size) * weights[n].to(t.device)).mean() for n, t in targets.items()]
    return dict(zip(targets, torch.stack(errors).tolist(), strict=True))


def loss_weights(
    inputs: Streams, outputs: Streams, names: Sequence[str], importance: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """fp32 [C] for each stream: the loss is the mean over all of weight times square error, added over streams.

    Errors are measured by what the teacher's window adds to the streams: an output that is none gives 1 in all, with
    `importance` (channels and streams weighed by it), and 1 for each stream without.
    """
    changes = {n: _square_error(outputs.streams[n], inputs.streams[n], inputs.batch_size) for n in names}
    if importance is None:
        found = {n: torch.ones_like(c) / c.mean().clamp_min(1e-20) for n, c in changes.items()}
    else:
        weights = {n: importance[n].to(changes[n].device) for n in names}
        total = sum(((weights[n] * changes[n]).mean() for n in names), torch.zeros((), device=changes[names[0]].device))
        found = {n: weights[n] / total.clamp_min(1e-30) for n in names}
    return {n: w.to(inputs.device) for n, w in found.items()}


def _square_error(a: Tensor, b: Tensor, batch_size: int) -> Tensor:
    """Mean over samples and tokens, [C]; in chunks: no second fp32 copy of what may be most of the memory."""
    parts = zip(a.split(batch_size), b.split(batch_size), strict=True)
    sums = [(x.float() - y.float()).square().flatten(0, -2).sum(dim=0) for x, y in parts]
    return torch.stack(sums).sum(dim=0) / (a.numel() // a.shape[-1])
