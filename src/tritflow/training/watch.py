"""`python -m tritflow.training.watch RUN`: score a training run's kept weights beside the training, into `curve.json`.

Scoring inside the training loop would keep the GPU waiting for the detector; a second process does not. With
`--results DIR` the curve becomes a run of the topic "training" there: `tritflow report --curve` draws it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from tritflow.formats.atomic import write_atomic
from tritflow.results import append, path_for, provenance
from tritflow.scenes.held_out import evaluation_prompts
from tritflow.training import autoencoder, data, flow, models
from tritflow.training.run import PROGRESS_SEED
from tritflow.training.score import score


def watch(
    folder: Path,
    *,
    name: str = "flow-last.safetensors",
    per_tag: int = 32,
    size: int = 128,
    workers: int = 4,
    seconds: float = 3600,
    log: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
    """Score `name` in `folder` whenever it changes, until `seconds` are over or `folder/stop` exists."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    tokenizers = data.word_tokenizers()
    prompts = evaluation_prompts(per_tag, PROGRESS_SEED)
    sizes = models.SmallFluxSize()
    clip, t5 = models.build_text_encoders(sizes, *tokenizers)
    model = flow.SmallFlux(clip, t5, models.build_transformer(sizes)).to(device).eval().requires_grad_(False)
    curve: list[dict[str, Any]] = []
    seen, vae, end = 0.0, None, time.monotonic() + seconds
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while time.monotonic() < end and not (folder / "stop").exists():
            path = folder / name
            if not path.exists() or path.stat().st_mtime == seen:
                time.sleep(1)
                continue
            seen = path.stat().st_mtime
            try:
                with safe_open(path, "pt") as file:
                    facts = {k: float(v) for k, v in (file.metadata() or {}).items() if k in ("steps", "seconds")}
                model.load_state_dict(load_file(path))
            except (SafetensorError, FileNotFoundError) as error:  # replaced while being read
                log(f"{name}: {error}; waiting for the next one")
                continue
            vae = vae or autoencoder.load(folder).to(device)
            scores = score(model, vae, tokenizers, prompts, size=size, pool=pool, true_guidance=2.5)
            curve.append(facts | scores)
            write_atomic(folder / "curve.json", (json.dumps(curve, indent=1) + "\n").encode())
            log(" ".join(f"{k} {round(v, 3)}" for k, v in (facts | scores).items()))
    return curve


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tritflow.training.watch", description=__doc__)
    parser.add_argument("run", type=Path, help="folder that `python -m tritflow.training --keep-every S` writes to")
    parser.add_argument("--per-tag", type=int, default=32)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 4))
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--results", type=Path, help="folder of results files that takes the curve at the end")
    args = parser.parse_args(argv)
    if not args.run.is_dir():
        parser.error(f"{args.run}: no such folder; start the training first")
    curve = watch(
        args.run,
        per_tag=args.per_tag,
        size=args.size,
        workers=args.workers,
        seconds=args.seconds,
        log=lambda text: print(text, flush=True),
    )
    if args.results and curve:
        source = provenance("cuda" if torch.cuda.is_available() else "cpu")
        run = {"label": "small FLUX", "prompts_per_tag": args.per_tag, "curve": curve}
        append(path_for(args.results, "training", source["device"]), "training", source | run)


if __name__ == "__main__":
    main()
