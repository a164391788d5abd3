"""Blocks of a model whose weights are only there while they are used.

The model's blocks are empty (on the meta device). When one runs, its weights are read, and dropped behind it, so that a
model of any depth runs forward and backward in the memory of one block. Whoever needs a block for longer holds it with
`loaded`; some may stay for good within a budget, which is all that tells a small model from a large one.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class StreamedBlocks:
    """Takes over the `forward` of a model's blocks until `close`.

    Args:
        model: what is not in `names` is on `device`; the blocks may be anywhere, the meta device included.
        names: of the blocks, in running order.
        read: gives a tensor of the model by its full name, any floating dtype, anywhere; fresh, it becomes the block's.
        device: where blocks run.
        dtype: in which; None: as read.
        keep_bytes: of blocks that stay on the device once they were used, the first ones first.
        whole: the blocks are on the device with their weights, and stay.

    Attributes:
        model, names, device: as given.
        peak: the most parameters of `read` blocks that were on the device at once so far.

    Raises:
        ValueError: a block holds a buffer that no checkpoint has.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        read: Callable[[str], Tensor],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        keep_bytes: int = 0,
        whole: bool = False,
    ) -> None:
        self.model, self.names, self.device = model, list(names), torch.device(device)
        self.peak = 0
        self._read, self._dtype, self._keep = read, dtype, keep_bytes
        self._blocks = {name: model.get_submodule(name) for name in self.names}
        self._users = dict.fromkeys(self.names, 0)
        self._there = set(self.names) if whole else set()
        self._held = set(self._there)
        self._sizes: dict[str, int] = {}
        for name, block in self._blocks.items():
            state = block.state_dict(keep_vars=True)
            lost = {n for n, _ in block.named_buffers()} - set(state)
            if lost:
                raise ValueError(f"'{name}.{sorted(lost)[0]}' is in no checkpoint: the block cannot be streamed")
            self._sizes[name] = sum(t.numel() for t in state.values())
            if not whole:
                self._drop(name)
            block.forward = functools.partial(self._forward, name)

    @classmethod
    def in_memory(cls, model: nn.Module, names: Sequence[str]) -> Self:
        """For a model that is whole on its device already and stays so; nothing is copied."""
        state = dict(model.state_dict(keep_vars=True))
        device = next(iter(state.values())).device if state else torch.device("cpu")
        return cls(model, names, lambda name: state[name].detach(), device=device, whole=True)

    def parameters_of(self, name: str) -> int:
        """How many parameters a block has."""
        return self._sizes[name]

    @contextmanager
    def loaded(self, name: str) -> Iterator[nn.Module]:
        """The dense block with its weights on the device; not to be changed."""
        if name not in self._there:
            block = self._blocks[name]
            for leaf in block.state_dict():
                _put(block, leaf, self._tensor(name, leaf))
            self._there.add(name)
            self.peak = max(self.peak, sum(self._sizes[n] for n in self._there))
        self._users[name] += 1
        try:
            yield self._blocks[name]
        finally:
            self._users[name] -= 1
            if not self._users[name] and not self._stays(name):
                self._drop(name)

    def copy(self, name: str) -> nn.Module:
        """A dense copy of a block, on the device, that belongs to the caller."""
        block = self._blocks[name]
        forward = block.__dict__.pop("forward")  # it belongs to the original
        try:
            new = copy.deepcopy(block)
        finally:
            block.forward = forward
        if name not in self._there:
            for leaf in new.state_dict():
                _put(new, leaf, self._tensor(name, leaf))
        return new

    def close(self) -> None:
        """Give every block its own `forward` back; blocks that did not stay are left empty."""
        for block in self._blocks.values():
            block.__dict__.pop("forward", None)

    def _tensor(self, name: str, leaf: str) -> Tensor:
        tensor = self._read(f"{name}.{leaf}")
        return tensor.to(self.device, self._dtype if tensor.is_floating_point() else None)

    def _stays(self, name: str) -> bool:
        """Whether an unused block keeps its weights; the first that fit do, since all are used in turn."""
        if name not in self._held and self._bytes(*self._held, name) <= self._keep:
            self._held.add(name)
        return name in self._held

    def _bytes(self, *names: str) -> int:
        return sum(t.nbytes for name in names for t in self._blocks[name].state_dict().values())

    def _drop(self, name: str) -> None:
        block = self._blocks[name]
        for leaf, tensor in block.state_dict().items():
            # The right dtype even when empty: some ask.
            dtype = self._dtype if tensor.is_floating_point() else None
            _put(block, leaf, torch.empty_like(tensor, device="meta", dtype=dtype))
        self._there.discard(name)

    def _forward(self, name: str, *args: Any, **kwargs: Any) -> Any:
        block = self._blocks[name]
        run = functools.partial(type(block).forward, block)
        tracked = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.requires_grad]
        if not (torch.is_grad_enabled() and tracked) or name in self._held:
            with self.loaded(name):
                return run(*args, **kwargs)
        # Backward reads the block once more, instead of keeping the weights of all blocks until then.
        places = {id(t): i for i, t in enumerate(tracked)}

        def again(*tensors: Tensor) -> Any:
            given = [tensors[places[id(a)]] if id(a) in places else a for a in args]
            named = {k: tensors[places[id(v)]] if id(v) in places else v for k, v in kwargs.items()}
            with self.loaded(name):
                return run(*given, **named)

        return checkpoint(again, *tracked, use_reentrant=True, preserve_rng_state=False)


def _put(block: nn.Module, leaf: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer, whatever its device and dtype were."""
    parent, _, last = leaf.rpartition(".")
    module = block.get_submodule(parent)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[last] = tensor
