"""A promise that kernels may rely on: nothing launched meanwhile writes a packed weight, its scale or its bias."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_PROMISED: ContextVar[bool] = ContextVar("tritflow_constant_weights", default=False)


@contextmanager
def constant_weights(device: torch.device | None = None) -> Iterator[None]:
    """Promise that no kernel that this thread launches inside writes a packed weight, its scale or its bias.

    Then products of few rows on Hopper may read weights while the kernel before them is still running (programmatic
    dependent launch). Only kernels overlap so, and only with the one before in a stream or a graph; copies are waited
    for whole. The launch of a graph waits for all that was there before, so the first kernel of a graph captured inside
    has nobody to overlap with. What was launched one by one before could overlap: entering waits for the stream.

    Weights that change between replays of such a graph are fine, weights that the graph itself brings are not: leave
    layers that are offloaded or streamed out of it.

    Args:
        device: whose current stream the kernels go to; the current CUDA device without it.

    Raises:
        RuntimeError: entered while a graph is captured, whose earlier kernels nothing is promised of.
    """
    on_gpu = device is None or device.type == "cuda"
    if on_gpu and not _PROMISED.get() and torch.cuda.is_available() and torch.cuda.is_initialized():
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("constant_weights() speaks for whole graphs: enter it before the capture begins")
        torch.cuda.current_stream(device).synchronize()
    token = _PROMISED.set(True)
    try:
        yield
    finally:
        _PROMISED.reset(token)


def weights_are_constant() -> bool:
    """Whether this thread is inside of `constant_weights`."""
    return _PROMISED.get()
