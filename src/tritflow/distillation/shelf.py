"""Where activations lie while blocks are run one by one, and how many samples a budget has room for."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tritflow.config import ActivationStore, StreamingConfig
from tritflow.formats.atomic import disk_full, is_disk_full

GOLDEN = (5**0.5 - 1) / 2


class BudgetError(ValueError):
    """The activation budget has no room for a stage. Says what would fit."""


@dataclass(frozen=True)
class Room:
    """What a stage may keep.

    Attributes:
        samples: for calibration or training.
        held: held-out ones, to judge by.
        limited: fewer than the stage wanted.
    """

    samples: int
    held: int
    limited: bool


@dataclass(frozen=True)
class Shelf:
    """Places for kept tensors.

    Attributes:
        budget: bytes that a stage may keep in all; None: no limit.
        store: see `StreamingConfig.activation_store`.
        folder: for `disk`; files in it are nameless, so that nothing is left behind by a kill.
    """

    budget: int | None = None
    store: ActivationStore = "auto"
    folder: Path | None = None

    @classmethod
    def of(cls, config: StreamingConfig, folder: Path) -> Shelf:
        """As a recipe says, with its files in `folder`."""
        return cls(config.budget_bytes, config.activation_store, folder)

    def room(self, wanted: int, held: int, each: int, copies: int) -> Room:
        """How many samples fit.

        Args:
            wanted: samples the stage asks for.
            held: held-out samples beside them; at most an eighth of what fits is given to them.
            each: bytes of one sample's streams.
            copies: how many sets of streams are alive at once.

        Raises:
            BudgetError: not even one sample and one to judge by.
        """
        if self.budget is None or (wanted + held) * each * copies <= self.budget:
            return Room(wanted, held, False)
        fit = self.budget // (each * copies)
        held = min(held, max(1, fit // 8)) if held else 0
        if fit - held < 1:
            raise BudgetError(
                f"streaming.activation_budget has room for {fit} samples, {copies} times {each / 2**20:.1f} MiB each; "
                f"it must be at least {(1 + held) * each * copies / 2**20:.0f}MiB"
            )
        return Room(fit - held, held, True)

    def device(self, nbytes: int, device: torch.device) -> torch.device:
        """Where `nbytes` go: `device` itself if it is a GPU with room to spare, else memory (or disk)."""
        if self.store == "auto" and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if nbytes < 0.4 * free:
                return device
        return torch.device("cpu")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; on the CPU it lies where `store` says.

        Raises:
            DiskFullError: `disk`, and no space for it.
        """
        if self.store != "disk" or device.type != "cpu" or not shape or 0 in shape:
            return torch.empty(shape, dtype=dtype, device=device)
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"streams-{os.getpid()}"
        size = torch.Size(shape).numel()
        try:
            with path.open("wb") as stream:
                # Space now: what is written through a map to a full disk kills the process.
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(stream.fileno(), 0, size * dtype.itemsize)
                elif shutil.disk_usage(self.folder).free < size * dtype.itemsize:
                    raise disk_full(path)
            return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)
        except OSError as error:
            raise (disk_full(path) if is_disk_full(error) else error) from None
        finally:
            path.unlink(missing_ok=True)


def spread(trajectories: int, steps: int, samples: int, limited: bool = False) -> Tensor:
    """Which pairs of a split are taken, [samples] increasing numbers below trajectories * steps.

    Evenly, as a stage that gets all it wants does. `limited`: trajectories evenly and steps by the golden ratio, since
    an even stride close to a multiple of `steps` would see the same few steps again and again.
    """
    size = trajectories * steps
    samples = min(samples, size)
    if not limited or samples == size:
        return torch.linspace(0, size - 1, samples).round().long()
    places = torch.arange(samples)
    which = places * trajectories // samples
    step = ((places.double() * GOLDEN) % 1.0 * steps).long()
    return (which * steps + step).unique()
