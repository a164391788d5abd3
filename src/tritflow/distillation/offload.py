"""Latent weights and momenta in the machine's memory: all trits move end to end on a GPU that holds one block of them.

A block's latent weights come to the GPU when it runs, forward and once more in the backward pass. There each takes its
step as soon as its gradient is known (`lean`), and goes home. What is computed is what is computed without.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from tritflow.modules.fake import FakeTernaryLinear


class OffloadedLatents:
    """Takes the moving latent weights of a model's blocks off the device until `close`, or the end of a `with`.

    Args:
        model: its blocks run again in the backward pass (gradient checkpointing), else nothing is saved.
        blocks: names of the blocks.
        device: where blocks run.

    Attributes:
        device: as given.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._homes: dict[int, Tensor] = {}
        self._away: dict[int, Tensor] = {}
        self._locked: list[Tensor] = []
        self._handles: list[Any] = []
        for name in blocks:
            block = model.get_submodule(name)
            latents = [m.weight for m in block.modules() if isinstance(m, FakeTernaryLinear) and m.moves]
            for latent in latents:
                latent.data = self._homes[id(latent)] = self.page_locked(latent.data)
            self._handles += [
                block.register_forward_pre_hook(lambda *_, latents=latents: self._fetch(latents)),
                block.register_forward_hook(lambda *_, latents=latents: self._leave(latents)),
            ]

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._homes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def page_locked(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in pages of its own, locked for copies at full speed where the system allows it.

        PyTorch's own pinned memory comes in powers of two, which would be half as much again.
        """
        if not tensor.numel():
            return tensor.cpu()
        pages = mmap.mmap(-1, tensor.nbytes)  # lives as long as what is made of it
        held = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        held.copy_(tensor)
        if self.device.type == "cuda":
            if int(torch.cuda.cudart().cudaHostRegister(held.data_ptr(), held.nbytes, 0)) == 0:
                self._locked.append(held)
            else:
                with suppress(RuntimeError):  # whatever is launched next would be told of it
                    torch.zeros(1, device=self.device)
        return held

    def stepped(self, parameter: Tensor) -> None:
        """Send a latent weight home that has taken its step."""
        self._homes[id(parameter)].copy_(parameter.data, non_blocking=True)
        self._send_home(parameter)

    def settle(self) -> None:
        """After a backward pass: latent weights that had no gradient go home as they came."""
        for parameter in list(self._away.values()):
            self._send_home(parameter)

    def wait(self) -> None:
        """Until what was sent home is there; before the machine's memory is read."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self) -> None:
        """Leave all latent weights in the machine's memory, unlocked, and let the blocks run as they did."""
        self.settle()
        self.wait()
        for handle in self._handles:
            handle.remove()
        for tensor in self._locked:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self._handles, self._locked = [], []

    def _fetch(self, latents: Sequence[Tensor]) -> None:
        for latent in latents:
            if id(latent) not in self._away:
                latent.data = self._homes[id(latent)].to(self.device, non_blocking=True, copy=True)
                self._away[id(latent)] = latent

    def _leave(self, latents: Sequence[Tensor]) -> None:
        # A block that runs again for its gradients is needed until they are there.
        if torch._C._current_graph_task_id() == -1:
            for latent in latents:
                self._send_home(latent)

    def _send_home(self, parameter: Tensor) -> None:
        if self._away.pop(id(parameter), None) is not None:
            parameter.data = self._homes[id(parameter)]
