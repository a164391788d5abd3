"""Latent weights of the blocks that two overlapping windows share, kept on disk from one to the next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tritflow.calibration.artifacts import write_tensors
from tritflow.modules.fake import FakeTernaryLinear


class Overlap:
    """Files `overlap-NUMBER` in a folder, NUMBER the first block of the window that goes on from it.

    Args:
        folder: of the job.
        job: files of another job are not seen.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.job = folder, job

    def save(self, blocks: Mapping[str, nn.Module], first: int) -> None:
        """Write the training twins of `blocks` atomically, for the window that begins with block `first`."""
        tensors = {
            f"{block}.{leaf}/{name}": parameter
            for block, module in blocks.items()
            for leaf, twin in module.named_modules()
            if isinstance(twin, FakeTernaryLinear)
            for name, parameter in twin.named_parameters()
        }
        write_tensors(self._path(first), tensors, {"job": self.job})

    @torch.no_grad()
    def load_(self, blocks: Mapping[str, nn.Module], first: int) -> None:
        """Put what was saved for that window into `blocks`; nothing happens where nothing was."""
        try:
            with safe_open(self._path(first), framework="pt") as stream:
                if json.loads(stream.metadata()["tritflow"])["job"] != self.job:
                    return
                for key in stream.keys():  # noqa: SIM118 (safe_open is no mapping)
                    module, _, name = key.rpartition("/")
                    block = next(b for b in blocks if module.startswith(f"{b}."))
                    twin = blocks[block].get_submodule(module.removeprefix(f"{block}."))
                    twin.get_parameter(name).copy_(stream.get_tensor(key))
        except FileNotFoundError:
            return
        except (SafetensorError, KeyError, TypeError, ValueError, StopIteration) as error:
            raise ValueError(f"{self._path(first)} is damaged ({error}); remove {self.folder} to begin again") from None

    def drop_before(self, first: int) -> None:
        """Remove files of windows that are done."""
        for path in self.folder.glob("overlap-*"):
            if path != self._path(first):
                path.unlink(missing_ok=True)

    def _path(self, first: int) -> Path:
        # Not *.safetensors: the roundings beside it are found by that ending.
        return self.folder / f"overlap-{first:05d}"
