"""Which kernels run: a table of backends, each saying per operation what it can take.

A backend is a module with a `BACKEND` object, imported when a tensor on its kind of device first asks for it, so that
importing `tritflow.kernels` neither imports Triton nor touches a GPU. `auto` takes the first backend in the
device's order that is usable here and supports the arguments; the reference is last in every order. On a GPU that was
measured (`tuning.py`) the fastest backend for the size comes first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tritflow.config import nearest
from tritflow.kernels import tuning


class BackendError(ValueError):
    """A backend was named that does not exist, cannot run here, or does not take these arguments."""


@dataclass(frozen=True)
class Kernel:
    """One operation of one backend.

    Attributes:
        run: called with the op's arguments, without `backend`.
        supports: same arguments; whether `run` takes them. Cheap, and never synchronises a device.
        automatic: whether `auto` may take it; False until it was proven on a GPU.
    """

    run: Callable[..., Any]
    supports: Callable[..., bool]
    automatic: bool = True


@dataclass(frozen=True)
class Backend:
    """A set of kernels for some kinds of device.

    Attributes:
        name: as in `TernaryConfig.backend`.
        device_types: `torch.device.type`s it runs on; empty for any.
        why_not: one line on why it cannot run on this device here, or None. Called often: cache it.
        kernels: operation name (see `ops.py`, `block_ops.py` and `matmul_op.py`) to kernel; not every backend has all.
    """

    name: str
    device_types: tuple[str, ...]
    why_not: Callable[[torch.device], str | None]
    kernels: dict[str, Kernel]


_MODULES = {
    "hopper": "tritflow.kernels.hopper.backend",
    "triton": "tritflow.kernels.triton.backend",
    "scratch": "tritflow.kernels.scratch",
    "cpu": "tritflow.kernels.cpu",
    "reference": "tritflow.kernels.reference",
}
_ORDER = {"cuda": ("hopper", "triton", "reference"), "cpu": ("cpu", "reference")}
_DEFAULT_ORDER = ("reference",)

NAMES = ("auto", *_MODULES)


@cache
def load(name: str) -> Backend | str:
    """The backend called `name`, or one line on why its module cannot be imported."""
    try:
        backend: Backend = importlib.import_module(_MODULES[name]).BACKEND
    except ImportError as error:
        return f"{error}"
    return backend


def _usable(name: str, device: torch.device) -> Backend | str:
    backend = load(name)
    if isinstance(backend, str):
        return backend
    if backend.device_types and device.type not in backend.device_types:
        return f"it runs on {' and '.join(backend.device_types)}, not on {device.type}"
    return backend.why_not(device) or backend


def select(op: str, backend: str, device: torch.device, args: tuple[Any, ...]) -> Callable[..., Any]:
    """The function that computes `op` for these arguments.

    Args:
        op: operation name.
        backend: a name of `NAMES`.
        device: where the arguments lie.
        args: the op's arguments, without `backend`.

    Raises:
        BackendError: an unknown name, or an explicit backend that cannot run here or take these arguments.
    """
    if backend == "auto":
        order = _ORDER.get(device.type, _DEFAULT_ORDER)
        preferred = tuning.preferred(op, device, args) if device.type == "cuda" and op in tuning.TUNED else ()
        for name in (*preferred, *order):
            found = _usable(name, device)
            if not isinstance(found, str):
                kernel = found.kernels.get(op)
                # What was measured here was proven here.
                chosen = kernel is not None and (kernel.automatic or name in preferred)
                if kernel is not None and chosen and kernel.supports(*args):
                    return kernel.run
        raise BackendError(f"no backend computes {op} on {device.type}")  # the reference takes everything
    if backend not in _MODULES:
        raise BackendError(f"unknown backend '{backend}'{nearest(backend, list(NAMES))}: use one of {', '.join(NAMES)}")
    found = _usable(backend, device)
    if isinstance(found, str):
        raise BackendError(f"backend '{backend}' cannot be used here: {found}; use backend 'auto'")
    kernel = found.kernels.get(op)
    if kernel is None or not kernel.supports(*args):
        sizes = ", ".join(f"{a.dtype} {list(a.shape)}" for a in args[:1] if isinstance(a, torch.Tensor))
        raise BackendError(
            f"backend '{backend}' does not compute {op} for these arguments ({sizes}); use backend 'auto'"
        )
    return kernel.run


def fallback(device: torch.device) -> str | None:
    """Why `auto` has nothing but the reference for products on a GPU, in one line; None where it has more."""
    if device.type != "cuda":
        return None
    if any(not isinstance(_usable(name, device), str) for name in _ORDER["cuda"] if name != "reference"):
        return None
    reason = _usable("triton", device)  # of all that could have run, the one with the fewest wants
    return reason if isinstance(reason, str) else None


def describe() -> dict[str, str]:
    """Every backend and whether it can run on this machine, for `tritflow inspect --env`."""
    lines: dict[str, str] = {}
    for name in _MODULES:
        found = load(name)
        if isinstance(found, str):
            lines[name] = f"unavailable: {found}"
            continue
        kind = found.device_types[0] if found.device_types else "cpu"
        if kind == "cuda" and not torch.cuda.is_available():
            lines[name] = "unavailable: no CUDA device"
            continue
        reason = found.why_not(torch.device(kind, 0) if kind == "cuda" else torch.device(kind))
        lines[name] = f"unavailable: {reason}" if reason else f"ready ({', '.join(found.kernels)})"
    return lines
