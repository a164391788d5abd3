"""Look at what linear layers are given while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


@contextmanager
def watched(linears: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call `see(name, x)` with every input [..., K] of these layers.

    Raises:
        ValueError: in the end, one of them never ran.
    """
    ran: set[str] = set()

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            ran.add(name)
            see(name, args[0])

        return hook

    handles = [linear.register_forward_pre_hook(hook_of(name)) for name, linear in linears.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name in linears:
        if name not in ran:
            raise ValueError(f"'{name}' never ran: it cannot be calibrated")
