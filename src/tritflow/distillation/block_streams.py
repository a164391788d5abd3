"""What flows through a model's blocks, kept for a set of samples, so that blocks can be run one by one.

Knows no model family: `BlockCalls` says which arguments of a block are streams, which belong to a sample, and all
others are shared.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Split, Trajectories
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.shelf import Shelf
from tritflow.distillation.step import autocast
from tritflow.models.family import BlockCalls


class _Stop(Exception):
    """Raised before the first block runs: nothing behind it is wanted."""


@dataclass(frozen=True)
class Streams:
    """Inputs of one block for S samples. Batches come out on `device`, whatever the tensors lie on.

    Attributes:
        calls: how blocks are called.
        streams: name -> [S, ...].
        per_sample: name -> [S, ...].
        shared: everything else, on `device`.
        device: where blocks run.
        batch_size: samples run at once when a block is passed.
        shelf: gives room for new streams.
        mixed: blocks run under `autocast`.
    """

    calls: BlockCalls
    streams: dict[str, Tensor]
    per_sample: dict[str, Tensor]
    shared: dict[str, Any]
    device: torch.device
    batch_size: int
    shelf: Shelf
    mixed: bool = True

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
    def outputs(self, block: nn.Module) -> Iterator[tuple[slice, dict[str, Tensor]]]:
        """What `block`, which is on `device`, makes of the samples, batch by batch: (which samples, streams)."""
        for rows in torch.arange(self.samples).split(self.batch_size):
            inputs = self.batch(rows.to(self._store))
            with autocast(self.device) if self.mixed else nullcontext():
                out = call(block, self.calls, inputs, self.shared)
            yield slice(int(rows[0]), int(rows[-1]) + 1), out

    def through(self, block: nn.Module, in_place: bool = False) -> Streams:
        """The inputs of the next block: every sample passes `block`. In place, these streams are overwritten."""
        new: dict[str, Tensor] = {}
        for rows, out in self.outputs(block):
            for name, value in out.items():
                old = self.streams[name]
                if name not in new:
                    shape = (self.samples, *value.shape[1:])
                    same = in_place and shape == tuple(old.shape)
                    new[name] = old if same else self.shelf.empty(shape, old.dtype, old.device)
                new[name][rows] = value.to(old)
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
    if rows.device.type == "cpu" and device.type == "cuda":
        # Pinned memory is copied beside the computation, and kept by torch until the copy is done.
        return rows.pin_memory().to(device, non_blocking=True)
    return rows.to(device)  # nothing to do where it is there; "cuda" and "cuda:0" are the same, though not equal


def first_inputs(
    blocks: Blocks,
    trajectories: Trajectories,
    indices: Tensor,
    *,
    batch_size: int,
    split: Split = "train",
    shelf: Shelf | None = None,
    store: torch.device | None = None,
    mixed: bool = True,
) -> Streams:
    """Run the model up to its first block and keep what that block is given.

    Args:
        blocks: the dense model; none of its blocks is read.
        trajectories: where the pairs `indices` ([S]) of `split` are taken from.
        batch_size: samples run at once, here and through blocks.
        shelf: for this and all streams that follow from it.
        store: the device on which they are kept; None: where blocks run.
        mixed: see `Streams`.

    Raises:
        ValueError: the block never ran, or was not given what `calls` names.
    """
    shelf = shelf or Shelf()
    device, names = blocks.dense.device, (*blocks.calls.streams, *blocks.calls.per_sample)
    kept: dict[str, Tensor] = {}
    shared: dict[str, Any] = {}
    for rows in torch.arange(len(indices)).split(batch_size):
        given, shared = _inputs(blocks, trajectories.pairs(indices[rows], split, device).kwargs)
        for name in names:
            if name not in kept:
                shape = (len(indices), *given[name].shape[1:])
                kept[name] = shelf.empty(shape, given[name].dtype, device if store is None else store)
            kept[name][int(rows[0]) : int(rows[-1]) + 1] = given[name].to(kept[name])
    streams = {name: kept[name] for name in blocks.calls.streams}
    per_sample = {name: kept[name] for name in blocks.calls.per_sample}
    return Streams(blocks.calls, streams, per_sample, shared, device, batch_size, shelf, mixed)


def sample_bytes(blocks: Blocks, trajectories: Trajectories) -> int:
    """Bytes of one sample's streams. Raises as `first_inputs`."""
    one = trajectories.pairs(torch.zeros(1, dtype=torch.long), "all", blocks.dense.device)
    given, _ = _inputs(blocks, one.kwargs)
    return sum(given[name].nbytes for name in blocks.calls.streams)


@torch.no_grad()
def _inputs(blocks: Blocks, kwargs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the first block is given for one batch: (streams and per-sample arguments, all others)."""
    first, names = blocks.order[0], (*blocks.calls.streams, *blocks.calls.per_sample)
    found: dict[str, Any] = {}

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given.pop(next(iter(given)))  # self
        missing = [name for name in names if not isinstance(given.get(name), Tensor)]
        if missing:
            raise ValueError(f"'{first}' is not called with a tensor '{missing[0]}'; it takes {', '.join(given)}")
        found.update(given)
        raise _Stop

    handle = blocks.model.get_submodule(first).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        blocks.run(**kwargs)
    except _Stop:
        return {n: found[n] for n in names}, {n: value for n, value in found.items() if n not in names}
    finally:
        handle.remove()
    raise ValueError(f"the model finished without running '{first}': check the block order")


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
    errors = [(_square_error(out.streams[n], t, inputs) * weights[n]).mean() for n, t in targets.items()]
    return dict(zip(targets, torch.stack(errors).tolist(), strict=True))


def loss_weights(
    inputs: Streams, outputs: Streams, names: Sequence[str], importance: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """fp32 [C] for each stream: the loss is the mean over all of weight times square error, added over streams.

    Errors are measured by what the teacher's window adds to the streams: an output that is none gives 1 in all, with
    `importance` (channels and streams weighed by it), and 1 for each stream without.
    """
    changes = {n: _square_error(outputs.streams[n], inputs.streams[n], inputs) for n in names}
    if importance is None:
        return {n: torch.ones_like(c) / c.mean().clamp_min(1e-20) for n, c in changes.items()}
    weights = {n: importance[n].to(inputs.device) for n in names}
    total = sum(((weights[n] * changes[n]).mean() for n in names), torch.zeros((), device=inputs.device))
    return {n: weights[n] / total.clamp_min(1e-30) for n in names}


def _square_error(a: Tensor, b: Tensor, streams: Streams) -> Tensor:
    """Mean over samples and tokens, [C], computed where blocks run; in chunks: these may be most of the memory."""
    parts = zip(a.split(streams.batch_size), b.split(streams.batch_size), strict=True)
    on = streams.device
    sums = [(x.to(on).float() - y.to(on).float()).square().flatten(0, -2).sum(dim=0) for x, y in parts]
    return torch.stack(sums).sum(dim=0) / (a.numel() // a.shape[-1])
