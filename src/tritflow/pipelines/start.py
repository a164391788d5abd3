"""A finished ternary student as the start of another run: a leg of a long training, or a change of its settings.

A ternary folder holds trits, scales and tuned dense parameters, not how near its latent weights stood to the next trit.
Where they were kept (`latents.safetensors`, a byte a weight), training goes on from them; else latents start from the
teacher's weights, those on the wrong side of a threshold just inside the right one, as after compensation. What the
optimiser remembered is not kept: a leg warms up again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tritflow.assets import ASSETS, asset_path
from tritflow.calibration.artifacts import read_json, write_tensors
from tritflow.formats.checkpoint import TernaryFolder
from tritflow.formats.packing import unpack
from tritflow.formats.repacking import LATENTS
from tritflow.quantization.rounding import Rounded

# Latents in steps of 1/64 trit, read back at the middle of a step: thresholds at +-.5 lie between two.
STEPS = 64


class StartError(ValueError):
    """A folder cannot be started from. Says which and what to do."""


class Start(Mapping[str, Rounded]):
    """The roundings of a finished student by linear, its dense parameters and, where they were kept, its latents.

    Args:
        folder: what `tritflow quantize` wrote, or `small-student`.
        source: fingerprint of the dense model that the student must be of.

    Raises:
        StartError: not finished, or of another dense model.
        CheckpointError: damaged.
    """

    def __init__(self, folder: str | Path, source: str) -> None:
        self.path = asset_path(str(folder)) if str(folder) in ASSETS else Path(folder)
        meta = read_json(self.path / "meta.json") if (self.path / "meta.json").is_file() else {}
        if meta.get("kind") != "ternary" or not meta.get("complete"):
            raise StartError(f"{folder} holds no finished ternary model; --start takes a folder that quantize wrote")
        if meta["parents"]["source"] != source:
            raise StartError(f"{folder} was made from other weights than the source: --start takes a student of it")
        self.folder = TernaryFolder(self.path / "transformer")
        self.digest, self.column_scale = self.folder.digest, self.folder.ternary.column_scale
        self.latents = self._kept()

    def _kept(self) -> Path | None:
        path = self.path / LATENTS
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                note = json.loads(stream.metadata()["tritflow"])
        except (SafetensorError, KeyError, TypeError, ValueError):
            raise StartError(f"{path} is damaged; remove it to start from the trits alone") from None
        if note["digest"] != self.digest:
            raise StartError(f"{path} belongs to another student; remove it to start from the trits alone")
        return path

    @property
    def identity(self) -> str:
        """What fixes the run that starts here."""
        return self.digest + (" with latents" if self.latents else "")

    def __getitem__(self, name: str) -> Rounded:
        if name not in self.folder.linears:
            raise KeyError(name)
        q = self.folder.linear(name)
        trits = unpack(q.packed, q.in_features, self.folder.ternary.packing)
        column = None if q.input_scale is None else q.input_scale.float()
        return Rounded(trits, q.weight_scale.float(), column, None if q.bias is None else q.bias.float())

    def __iter__(self) -> Iterator[str]:
        return iter(self.folder.linears)

    def __len__(self) -> int:
        return len(self.folder.linears)

    @torch.no_grad()
    def fill_(self, parameters: Mapping[str, nn.Parameter], latents: Mapping[str, nn.Parameter]) -> None:
        """Put the student's dense parameters into a model, and its latents where they were kept.

        Args:
            parameters: of the model by name, those that belong to no ternary linear.
            latents: latent weights [N, K] by linear, as they started from its trits.
        """
        for name in self.folder.dense_names():
            if name in parameters:
                parameters[name].copy_(self.folder.tensor(name))
        if self.latents is None:
            return
        with safe_open(self.latents, framework="pt") as stream:
            for name, latent in latents.items():
                latent.copy_((stream.get_tensor(name).float() + 0.5) / STEPS)


def write_latents(path: Path, latents: Mapping[str, Tensor], digest: str) -> None:
    """Keep latent weights [N, K], counted in trits, a byte each; beyond +-2 they come nearer.

    Args:
        latents: int8 by linear, of `pack_latent`.
        digest: of the student that they round to.

    Raises:
        DiskFullError: no space left.
    """
    write_tensors(path, latents, {"digest": digest})


def pack_latent(latent: Tensor) -> Tensor:
    """int8 [N, K]: steps of 1/64 trit, rounded down; rounding what is read back gives the same trits."""
    steps = (latent.detach().float() * STEPS).floor()
    # On a threshold torch rounds to the even trit, 0, and a step belongs to what lies above its lower end.
    steps = torch.where(latent == 0.5, steps - 1, steps)
    return steps.clamp(-128, 127).to(torch.int8)
