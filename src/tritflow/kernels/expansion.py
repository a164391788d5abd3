"""The form in which a machine multiplies a packed weight fastest, kept with the weight itself."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

EXPANSION = "_tritflow_expansion"
"""Attribute of a packed weight that owns its expanded form."""


class Expansion:
    """The expanded form of one packed weight: at most one at a time, rebuilt when its key changes."""

    __slots__ = ("bytes", "form", "key")

    def __init__(self) -> None:
        self.key: Hashable = None
        self.form: Any = None
        self.bytes = 0
        """Resident bytes of the form (0: none yet). oneDNN may pad its own layouts a little beyond this."""

    def drop(self) -> None:
        """Free the form; the next call builds it again."""
        self.key, self.form, self.bytes = None, None, 0


def stamp(tensor: Tensor | None) -> Hashable:
    """Changes whenever the tensor's data may have: another storage, or a write in place."""
    if tensor is None:
        return None
    return tensor.data_ptr(), (0 if tensor.is_inference() else tensor._version)


def expanded(weight: Tensor, key: Hashable, build: Callable[[], tuple[Any, int]]) -> Any:
    """What `build` (the form and its bytes) makes of `weight`, kept on it under `key` if it owns an `Expansion`."""
    expansion: Expansion | None = getattr(weight, EXPANSION, None)
    if expansion is None:
        return build()[0]
    if expansion.key != key:
        expansion.form, expansion.bytes = build()
        expansion.key = key
    return expansion.form
