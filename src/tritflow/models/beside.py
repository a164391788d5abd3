"""Small work beside large work: a second CUDA stream, as a branch of the graph that is being recorded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

Small = TypeVar("Small")
Large = TypeVar("Large")


@cache
def _side(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _recording() -> bool:
    if torch.compiler.is_compiling() or not torch.cuda.is_available():
        return False
    return torch.cuda.is_current_stream_capturing()


def beside(small: Callable[[], Small], large: Callable[[], Large]) -> tuple[Small, Large]:
    """Both results; while a CUDA graph is recorded, the two may run at once, elsewhere one after the other.

    Launched from Python one by one they would gain nothing, and the rule below is for recorded work.

    Memory is safe without `record_stream` under one rule, which the caller keeps: what either side reads is held until
    this returns. Whatever is freed then is reused only by work that comes after the join, on either side.

    Args:
        small: work that leaves most of the GPU idle.
        large: work that depends on nothing of it.
    """
    if not _recording():
        return small(), large()
    main = torch.cuda.current_stream()
    side = _side(main.device_index)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        first = small()
    second = large()
    main.wait_stream(side)
    return first, second
