"""From a file to a GPU through two pinned buffers: one is filled while the other one is copied.

A tensor of its own in pageable memory costs four times as much (docs/LOG.md): pages are cleared,
filled, and copied once more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor

_SIZE = 32 << 20


class Staging:
    """Buffers of one device; threads take turns.

    Args:
        device: where bytes go.
        size: of each buffer, in bytes.
    """

    def __init__(self, device: torch.device, size: int = _SIZE) -> None:
        self.device, self._lock = device, threading.Lock()
        on_gpu = device.type == "cuda"
        try:
            self._buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
        except RuntimeError:  # no memory may be locked here: slower, as good
            self._buffers = [torch.empty(size, dtype=torch.uint8) for _ in range(2)]
        self._copied = [torch.cuda.Event() for _ in range(2)] if on_gpu else None

    def fill(self, out: Tensor, read: Callable[[memoryview], None]) -> None:
        """Fill `out`, uint8 [bytes] on the device; `read` is called in order and fills what it is given."""
        with self._lock:
            for number, part in enumerate(out.split(len(self._buffers[0]))):
                buffer = self._buffers[number % 2][: len(part)]
                if self._copied is not None:
                    self._copied[number % 2].synchronize()  # at once where nothing was recorded
                read(buffer.numpy().data)
                part.copy_(buffer, non_blocking=True)
                if self._copied is not None:
                    self._copied[number % 2].record(torch.cuda.current_stream(self.device))


_made: dict[torch.device, Staging] = {}
_making = threading.Lock()


def staging(device: torch.device) -> Staging:
    """The device's own, made when it is first asked for."""
    with _making:
        if device not in _made:
            _made[device] = Staging(device)
        return _made[device]
