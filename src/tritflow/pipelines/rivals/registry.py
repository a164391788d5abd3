"""The rivals by name, whether they can run here, and the one call that applies them."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritflow.calibration.artifacts import read_json
from tritflow.config import nearest


class RivalError(ValueError):
    """A rival is unknown, not installed, or cannot run on this device or these shapes. Says which and what to do."""


@dataclass(frozen=True)
class Rival:
    """One way to quantize linears.

    Attributes:
        name: on the command line.
        title: in tables.
        apply: "module:function" inside this package; called as (model, names, device, **settings), it quantizes the
            named linears in place and returns how many bytes they take (weights with scales, without biases).
        settings: for `apply`, as the library's documents have them.
        package: on PyPI, None if nothing is needed.
        module: import name of the package.
        cuda: whether only CUDA devices will do.
        bf16: whether only bfloat16 will do.
        simulated: whether the arithmetic is this project's own stand-in.
        calibrated: whether `apply` also gets `pipe`, the pipeline around the model, and `folder`, where that lies.
        stands_for: name of the rival that a simulation replaces where that one cannot run.
    """

    name: str
    title: str
    apply: str
    settings: dict[str, Any]
    package: str | None = None
    module: str | None = None
    cuda: bool = False
    bf16: bool = False
    simulated: bool = False
    calibrated: bool = False
    stands_for: str | None = None

    @property
    def version(self) -> str | None:
        """Of the package, None if nothing is needed or it is not installed."""
        try:
            return importlib.metadata.version(self.package) if self.package else None
        except importlib.metadata.PackageNotFoundError:
            return None

    def why_not(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, in words; None if it can."""
        if self.package and self.version is None:
            return f'{self.title} needs the package {self.package}: pip install "tritflow[rivals]"'
        if self.cuda and device.type != "cuda":
            return f"{self.title} has kernels for CUDA only: use --device cuda"
        if self.bf16 and dtype != torch.bfloat16:
            return f"{self.title} computes in bfloat16 only: use --dtype bfloat16"
        return None


def _library(name: str, title: str, function: str, package: str, module: str, **more: Any) -> Rival:
    flags = {key: more.pop(key) for key in ("cuda", "bf16") if key in more}
    return Rival(name, title, f"libraries:{function}", more, package, module, **flags)


_BNB = ("bitsandbytes", "bitsandbytes")
_QUANTO = ("optimum-quanto", "optimum.quanto")
_SDNQ = ("sdnq", "sdnq")

RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        _library("nf4", "bitsandbytes NF4, double quantization", "bitsandbytes_nf4", *_BNB),
        _library("quanto-int4", "quanto int4", "quanto", *_QUANTO, weights="qint4"),
        _library("quanto-int2", "quanto int2", "quanto", *_QUANTO, weights="qint2"),
        _library("torchao-int4", "torchao int4, group 128", "torchao_int4", "torchao", "torchao", cuda=True, bf16=True),
        _library("sdnq-uint4", "SDNQ uint4", "sdnq", *_SDNQ, weights_dtype="uint4"),
        _library("sdnq-uint2", "SDNQ uint2", "sdnq", *_SDNQ, weights_dtype="uint2"),
        _library("hqq-2", "HQQ 2 bits, group 64", "hqq", "hqq", "hqq", nbits=2, group_size=64),
        _library("hqq-4", "HQQ 4 bits, group 64", "hqq", "hqq", "hqq", nbits=4, group_size=64),
        _library("gguf-tq2_0", "GGUF TQ2_0", "gguf_tq2_0", "gguf", "gguf"),
        Rival("q2_k-simulated", "GGUF Q2_K (simulated)", "simulated:k_quant", {"kind": "q2_k"}, simulated=True),
        Rival("q4_k-simulated", "GGUF Q4_K (simulated)", "simulated:k_quant", {"kind": "q4_k"}, simulated=True),
        Rival(
            "svdquant-simulated",
            "SVDQuant W4A4, rank hidden / 96 (simulated, no smoothing)",
            "simulated:svdquant",
            {"width_per_rank": 96, "group_size": 64},
            simulated=True,
        ),
        Rival(
            "nf4-simulated",
            "NF4, double quantization (simulated)",
            "simulated:nf4",
            {},
            simulated=True,
            stands_for="nf4",
        ),
        Rival(
            "tq2_0-simulated", "GGUF TQ2_0 (simulated)", "simulated:tq2_0", {}, simulated=True, stands_for="gguf-tq2_0"
        ),
        Rival(
            "gptq-2",
            "GPTQ 2 bits, group 64 (computed here)",
            "gptq:gptq",
            {"bits": 2, "group_size": 64, "prompts": 64},
            simulated=True,
            calibrated=True,
        ),
        Rival("absmean-lora", "absmean trits + LoRA, distilled", "absmean_lora:apply", {"folder": None}),
    )
}


def find_rival(name: str) -> Rival:
    """The rival called `name`, or `name=FOLDER` for one that was trained into a folder.

    Raises `RivalError` with the nearest name when there is none, or when a folder is given in vain.
    """
    name, _, folder = name.partition("=")
    if name not in RIVALS:
        raise RivalError(f"there is no rival '{name}'{nearest(name, list(RIVALS))} (there are: {', '.join(RIVALS)})")
    rival = RIVALS[name]
    if not folder:
        return rival
    if "folder" not in rival.settings:
        raise RivalError(f"rival '{name}' is not trained; give its name alone, not {name}={folder}")
    return dataclasses.replace(rival, settings={**rival.settings, "folder": folder})


def chosen_rivals(text: str) -> list[Rival]:
    """Rivals by name, joined by commas; `all`: every one that needs no training, a simulation only where the library
    that it stands for is not installed.

    Raises `RivalError` for a name that is none.
    """
    if text != "all":
        return [find_rival(name.strip()) for name in text.split(",") if name.strip()]
    found = [r for r in RIVALS.values() if "folder" not in r.settings]
    return [r for r in found if r.stands_for is None or RIVALS[r.stands_for].version is None]


def rival_identity(rival: Rival) -> dict[str, Any]:
    """What decides its pictures beside the model: plain JSON. A trained rival is known by its folder's meta.json."""
    settings = dict(rival.settings)
    folder = settings.pop("folder", None)
    if folder is not None:
        path = Path(folder) / "meta.json"
        if not path.is_file():
            raise RivalError(f"{folder} holds no trained {rival.name} (no meta.json)")
        settings["trained"] = read_json(path)
    return {"rival": rival.name, "settings": settings, "package": rival.package, "version": rival.version}


@torch.no_grad()
def apply_rival_(
    rival: Rival, model: nn.Module, names: Sequence[str], *, pipe: Any = None, folder: str | Path | None = None
) -> dict[str, Any]:
    """Quantize the linears `names` of a dense model that is on its device, in place.

    Args:
        pipe, folder: the pipeline around the model and where it lies, for a rival that calibrates.

    Returns:
        Plain JSON: `title`, `version`, `simulated`, `weights` (how many), `bytes` that they take with their scales,
        and `bits_per_weight`.

    Raises:
        RivalError: it cannot run here, a layer does not suit it, or its library left a layer dense.
    """
    parameter = next(model.parameters())
    reason = rival.why_not(parameter.device, parameter.dtype)
    if reason:
        raise RivalError(reason)
    weights = sum(_linear(model, name).weight.numel() for name in names)
    widths = {name: _linear(model, name).in_features for name in names}
    module, _, function = rival.apply.partition(":")
    call = getattr(importlib.import_module(f"tritflow.pipelines.rivals.{module}"), function)
    more = dict(rival.settings)
    if rival.calibrated:
        if pipe is None or folder is None:
            raise RivalError(f"{rival.title} calibrates on pictures' latents: it needs the whole pipeline")
        more |= {"pipe": pipe, "folder": str(folder)}
    try:
        size: int = call(model, list(names), parameter.device, parameter.dtype, **more)
        # Kernels that some libraries build when they are first used fail here, not in the middle of a picture.
        for name, width in widths.items():
            model.get_submodule(name)(torch.zeros(1, 8, width, device=parameter.device, dtype=parameter.dtype))
    except RivalError:
        raise
    except Exception as error:
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise RivalError(f"{rival.title} failed on this model: {type(error).__name__}: {first}") from error
    return {
        "name": rival.name,
        "title": rival.title,
        "version": rival.version,
        "simulated": rival.simulated,
        "weights": weights,
        "bytes": size,
        "bits_per_weight": round(8 * size / weights, 4),
    }


def _linear(model: nn.Module, name: str) -> nn.Linear:
    linear = model.get_submodule(name)
    if type(linear) is not nn.Linear:
        raise RivalError(f"'{name}' is a {type(linear).__name__}, not a dense linear; rivals start from dense models")
    return linear
