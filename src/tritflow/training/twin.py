"""`python -m tritflow.training.twin SRC OUT`: the same FLUX with activation outliers, for quantization research.

Large diffusion transformers have channels tens of times larger than the rest, a small one has none, so a method
that outliers would break looks fine on it. The twin has them, and computes the same function: what makes a channel
is multiplied, what reads it divided. Weights are rounded to the source's dtype once more, or kept in float32.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from tritflow.assets import ASSETS, asset_path
from tritflow.calibration.artifacts import provenance, write_bytes, write_json
from tritflow.formats.locate import resolve
from tritflow.formats.source import open_source
from tritflow.models import family_of
from tritflow.models.rescale import Rescaling, outlier_factors

_LEFT_OUT = {"meta.json", "README.md"}  # they speak of the source


def make_twin(
    src: str | Path,
    out: str | Path,
    *,
    channels: int = 4,
    low: float = 50.0,
    high: float = 100.0,
    seed: int = 0,
    dtype: torch.dtype | None = None,
) -> dict[str, Any]:
    """Write the twin of a pipeline folder, one file of weights in memory at a time.

    Args:
        src: a pipeline folder, or `small`.
        out: the folder to write; must not exist, or be a twin that was made before.
        channels, low, high, seed: see `outlier_factors`.
        dtype: of the transformer's tensors; None keeps the source's. float32 leaves only float32 rounding. bfloat16
            rounds rescaled weights (a relative 2^-8 at most) and the modulation's biases once more; with `low = high
            = 64`, a power of two, only the biases.

    Returns:
        What was written to `out/meta.json`.

    Raises:
        ValueError: `src` is no pipeline folder, `out` is taken, or the factors cannot be.
        CheckpointError, FamilyError: `src` is no dense FLUX.1.
    """
    location = resolve(asset_path(str(src)) if str(src) in ASSETS else src)
    root, target = location.pipeline, Path(out)
    if root is None:
        raise ValueError(f"{src} is a bare transformer; give the folder of the whole pipeline")
    if target.exists() and not (target / "meta.json").is_file():
        raise ValueError(f"{target} exists and is no finished twin; remove it or choose another folder")
    source = open_source(location.transformer)
    family = family_of(source.config)
    groups = family.channel_groups(source.config)
    rescaling = Rescaling(groups, outlier_factors(groups, channels=channels, low=low, high=high, seed=seed))
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if not path.is_file() or inside.parts[0] in _LEFT_OUT or any(p.startswith(".") for p in inside.parts):
            continue
        if inside.parts[0] == "transformer" and path.suffix == ".safetensors":
            tensors = {n: rescaling.apply(n, _wide(t, dtype)) for n, t in load_file(path).items()}
            write_bytes(target / inside, save(tensors, {"format": "pt"}))
        else:
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target / inside)
    meta = {
        "kind": "twin",
        "version": 1,
        "parents": {"source": source.fingerprint()},
        "groups": len(groups),
        "channels": channels,
        "low": low,
        "high": high,
        "seed": seed,
        "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
        **provenance("cpu"),
    }
    write_json(target / "meta.json", meta)
    return meta


def _wide(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tritflow.training.twin", description=__doc__.split("\n")[0])
    parser.add_argument("src", help="a pipeline folder, or small")
    parser.add_argument("out", help="the folder to write")
    parser.add_argument("--channels", type=int, default=4, help="outlier channels a group (4)")
    parser.add_argument("--low", type=float, default=50.0, help="smallest factor (50)")
    parser.add_argument("--high", type=float, default=100.0, help="largest factor (100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the transformer (the source's)")
    args = parser.parse_args(argv)
    dtype = getattr(torch, args.dtype) if args.dtype else None
    try:
        meta = make_twin(
            args.src, args.out, channels=args.channels, low=args.low, high=args.high, seed=args.seed, dtype=dtype
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{args.out}: {meta['channels']} outlier channels in each of {meta['groups']} groups")


if __name__ == "__main__":
    main()
