"""Copies between page-locked memory and a GPU, beside what the GPU computes: a stream up, a stream down."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Load:
    """Tensors on their way to the device; `Bus.arrive` before they are used, or dropped."""

    tensors: list[Tensor]
    event: torch.cuda.Event | None


class Bus:
    """One device's way to the machine's memory. On a CPU every copy is made at once.

    What is sent down and brought up again comes in that order. Memory on the device belongs to the stream that
    computes, which waits where it would overtake a copy: the allocator has nothing to guess, all steps peak alike.

    Args:
        device: where tensors are brought.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        on_gpu = self.device.type == "cuda"
        self._up = torch.cuda.Stream(self.device) if on_gpu else None
        self._down = torch.cuda.Stream(self.device) if on_gpu else None
        self._locked: list[Tensor] = []
        self._written: dict[int, torch.cuda.Event] = {}  # address in memory -> when it holds what was sent
        self._leaving: list[Load] = []
        self._left: list[Load] = []

    def page_locked(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor in pages of its own, locked for copies at full speed where the system allows it.

        PyTorch's own pinned memory comes in powers of two, which would be half as much again.
        """
        if not tensor.numel():
            return tensor.cpu()
        pages = mmap.mmap(-1, tensor.nbytes)  # lives as long as what is made of it
        held = torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)
        held.copy_(tensor)
        if self._up is not None:
            if int(torch.cuda.cudart().cudaHostRegister(held.data_ptr(), held.nbytes, 0)) == 0:
                self._locked.append(held)
            else:
                with suppress(RuntimeError):  # whatever is launched next would be told of it
                    torch.zeros(1, device=self.device)
        return held

    def bring(self, homes: Sequence[Tensor]) -> Load:
        """Begin to copy tensors of the machine's memory to the device."""
        if self._up is None:
            return Load([home.to(self.device, copy=True) for home in homes], None)
        tensors = [torch.empty_like(home, device=self.device) for home in homes]
        self._up.wait_stream(torch.cuda.current_stream(self.device))  # it may still compute in that memory
        with torch.cuda.stream(self._up):
            for tensor, home in zip(tensors, homes, strict=True):
                if (written := self._written.get(home.data_ptr())) is not None:
                    self._up.wait_event(written)
                tensor.copy_(home, non_blocking=True)
            return Load(tensors, self._up.record_event())

    def arrive(self, load: Load) -> list[Tensor]:
        """Let what is computed next wait for a load; its tensors."""
        if load.event is not None:
            torch.cuda.current_stream(self.device).wait_event(load.event)
        return load.tensors

    def send(self, tensor: Tensor, home: Tensor) -> None:
        """Begin to copy a tensor of the device home; nobody may write to it any more. Kept until `turn` came twice."""
        if self._down is None:
            home.copy_(tensor)
            return
        self._down.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._down):
            home.copy_(tensor, non_blocking=True)
            written = self._down.record_event()
        self._written[home.data_ptr()] = written
        self._leaving.append(Load([tensor], written))

    def turn(self) -> None:
        """Free what was sent before the last turn, for what is computed from here on."""
        for load in self._left:
            self.arrive(load)
        self._left, self._leaving = self._leaving, []

    def wait(self) -> None:
        """Until all that was sent is there; before the machine's memory is read."""
        if self._up is not None:
            torch.cuda.synchronize(self.device)
            self._left, self._leaving = [], []
            self._written.clear()

    def close(self) -> None:
        """Wait, and unlock the memory."""
        self.wait()
        for tensor in self._locked:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())
        self._locked = []
