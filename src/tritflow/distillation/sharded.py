"""Training spread over processes: each sees a part of every batch, and holds a part of every parameter (FSDP2) or
all of them, where the optimiser needs whole matrices.

Started by `torchrun`. Without a process group everything here does nothing, so that training has one code path.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together.

    Attributes:
        rank: from 0.
        world: how many.
    """

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """Those of the process group, or one alone."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    @property
    def first(self) -> bool:
        """Whether this one writes files."""
        return self.rank == 0

    def part(self, indices: Tensor) -> Tensor:
        """This process's share of a batch [B].

        Raises:
            ValueError: B cannot be shared out evenly, so that the mean of means would not be the mean.
        """
        if len(indices) % self.world:
            raise ValueError(f"a batch of {len(indices)} cannot be shared by {self.world} processes; take a multiple")
        return indices.chunk(self.world)[self.rank] if self.world > 1 else indices

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over all processes."""
        if self.world > 1:
            value = value.clone()
            dist.all_reduce(value)
            value /= self.world
        return value

    def joined(self, rows: Tensor) -> Tensor:
        """The rows of all processes, one after the other: what `part` takes apart."""
        if self.world == 1:
            return rows
        parts = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    def agree(self, value: T) -> T:
        """The first process's value, in all."""
        if self.world > 1:
            found = [value]
            dist.broadcast_object_list(found, src=0)
            value = found[0]
        return value

    def every(self, value: T) -> list[T]:
        """What each process gives, in order, in all of them."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        self.every(0)


@contextmanager
def processes(device: torch.device | str) -> Iterator[Ranks]:
    """The process group that `torchrun` asks for, with this process's own GPU; nothing where it was not started by it.

    Processes wait for the first one without limit: it calibrates for hours.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield Ranks.here()
        return
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Objects and barriers go by gloo: a GPU that waits by nccl spins.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(days=30))
    try:
        yield Ranks.here()
    finally:
        # Sharded modules are in cycles and hold the group, whose threads abort a process that ends with them running.
        gc.collect()
        dist.destroy_process_group()


def shard_(model: nn.Module, blocks: Sequence[str], device: torch.device | str) -> None:
    """Spread a model's parameters over all processes, block by block, in place; before its parameters are collected.

    A block is whole only while it runs. With one process, nothing happens.
    """
    world = Ranks.here().world
    if world == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (world,))
    for name in blocks:
        fully_shard(model.get_submodule(name), mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def gathered(block: Any) -> Iterator[nn.Module]:
    """A sharded block with whole parameters, to be read; all processes enter together."""
    sharded = hasattr(block, "unshard")
    if sharded:
        block.unshard()
    try:
        yield block
    finally:
        if sharded:
            block.reshard()


def whole(tensor: Tensor) -> Tensor:
    """A parameter, or what belongs to it, in one piece; all processes call together."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def put_(into: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a parameter, or into this process's part of it."""
    if hasattr(into, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(into, DTensor)
        into.copy_(distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None))
    else:
        into.copy_(value)
