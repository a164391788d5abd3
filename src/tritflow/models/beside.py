"""Small work beside large work: a second CUDA stream, as a branch of the graph that is being recorded."""

from __future__ import annotations

from functools import cache
from types import TracebackType

import torch


@cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """``with Beside() as aside: small()``, then ``large()``, then ``aside.join()``: the two may run at once.

    Only while a CUDA graph is recorded; elsewhere the block is ordinary code. Launching from Python one by one would
    gain nothing, and the rule below is for recorded work.

    Memory is safe without `record_stream` under one rule, which the caller keeps: what either side reads is held
    until after `join`. Whatever is freed then is reused only by work that comes after the join, on either side.
    """

    def __init__(self) -> None:
        capturing = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        self._main = torch.cuda.current_stream() if capturing else None
        self._side = None if self._main is None else _side(self._main.device_index)
        self._context: torch.cuda.StreamContext | None = None

    def __enter__(self) -> Beside:
        if self._side is not None and self._main is not None:
            self._side.wait_stream(self._main)
            self._context = torch.cuda.stream(self._side)
            self._context.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._context is not None:
            self._context.__exit__(kind, error, trace)

    def join(self) -> None:
        """What follows waits for the block."""
        if self._side is not None and self._main is not None:
            self._main.wait_stream(self._side)
