"""`python -m tritflow.training.autoencoder RUN`: train a kept VAE further, its decoder alone or the encoder too.

RUN is the folder of a training run, a pipeline folder, or 'small' for the built-in model. Half of the scenes have one
object in front of another, and edges between two hues and marks on the ground count more. What comes out is kept only
if the detector's worst tag after the round trip and the share of pictures with ghosts are no worse than before by more
than chance, and the worst colour, texture and ground in dB no worse at all, or by half a dB where ghosts get fewer.

The decoder alone leaves latents as they are, so the flow need not know: the run's last stage takes the decoder that
then lies in its folder. With `--encoder` latents move a little, so the flow must be trained on after it (`python -m
tritflow.training --out RUN --resume RUN/flow.safetensors`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tritflow.formats.atomic import write_atomic
from tritflow.scenes import COLORS, SHAPES, SceneBatch, weakest
from tritflow.scenes.world import BACKGROUNDS, GRAY_LEVEL, HELD_OUT_COLORS, TEXTURES
from tritflow.training import data, models, start, vae
from tritflow.training.loop import rank, world_size
from tritflow.training.options import check_shares, mixture_arguments, mixture_of

SEED = 5_000_011  # scenes that neither the VAE nor the flow has seen
# Held-out prompts that decide what is kept; the reported figures use others.
SCORE_SEED = 1000
# The worst of eight tags of 200 prompts moves by as much between two equally good VAEs; and what the worst combination
# may lose, in dB, where ghosts get fewer.
CHANCE, PRICE = 0.01, 0.5


def train_further(
    model: Any,
    scenes: SceneBatch,
    *,
    usual: SceneBatch,
    seconds: float,
    size: int,
    device: torch.device,
    encoder: bool = False,
    way: float = 1.0,
    before: dict[str, float] | None = None,
    per_tag: int = 200,
    pool: Executor | None = None,
    log: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """Train a VAE in place on `scenes`, or leave it as it was if its worst tag would get worse.

    Args:
        usual: scenes as the flow sees them; where the encoder moves, shift and scale are taken from them anew.
        encoder: train it, too.
        way: how far to go from the old weights to the new ones: part of the way keeps more of what was not trained on
            (Wortsman et al., 2109.01903).
        before: what `scores` says of it, where that is known.
        per_tag: held-out prompts a tag for the detector, before and after.
        pool: where the detector reads.
        options: for `vae.train_vae`.

    Returns:
        `{"before": scores, "after": scores, "kept": bool, "encoder": bool}`, the same for all processes; scores hold
        the worst combination's dB (`scenes.weakest`) as `weakest`.
    """
    old = copy.deepcopy(model.state_dict())
    statistics = {name: model.config[name] for name in ("shift_factor", "scaling_factor")}
    model.to(device).eval()
    before = before or scores(model, per_tag, size, pool)
    log(f"vae: detector after the round trip, before: {before}")
    vae.train_vae(
        model.train(),
        scenes,
        seconds=seconds,
        size=size,
        device=device,
        decoder_only=not encoder,
        usual=usual,
        log=log,
        **options,
    )
    share(model.eval())
    if way < 1:
        model.load_state_dict({k: torch.lerp(old[k].to(v), v, way) for k, v in model.state_dict().items()})
    after = scores(model, per_tag, size, pool)
    kept = _kept(before, after)
    log(f"vae: detector after the round trip, after: {after}")
    if not kept:
        log("vae: no better than before, so it stays as it was")
        model.load_state_dict(old)
        model.register_to_config(**statistics)
    return {"before": before, "after": after, "kept": kept, "encoder": encoder}


def focused(scenes: SceneBatch, words: str, every: int = 2) -> SceneBatch:
    """One scene in `every` with all objects in the colour and texture, and on the ground, that `words` name: what a VAE
    draws badly and seldom sees. Objects whose shape must not have that colour keep theirs.

    Raises:
        ValueError: a word is no colour, texture or ground of the world.
    """
    named = words.split()
    for word in named:
        if word not in (*COLORS, *TEXTURES, *BACKGROUNDS):
            raise ValueError(
                f"--focus: '{word}' is no colour, texture or ground ({', '.join(COLORS + TEXTURES + BACKGROUNDS)})"
            )
    kind, ground = scenes.kind.clone(), scenes.ground.clone()
    turn = None if scenes.turn is None else scenes.turn.clone()
    rows = torch.arange(len(scenes)) % every == 0
    for word in named:
        if word in BACKGROUNDS:
            ground[rows] = GRAY_LEVEL[word]
        elif word in TEXTURES:
            kind[..., 2] = torch.where(rows[:, None] & (kind[..., 0] >= 0), TEXTURES.index(word), kind[..., 2])
        else:
            allowed = torch.tensor([(shape, word) not in HELD_OUT_COLORS for shape in SHAPES])
            # A blend's second shape counts, too.
            fits = rows[:, None] & (kind[..., 0] >= 0) & allowed[kind[..., 0].clamp(min=0)]
            if scenes.other is not None:
                fits &= (scenes.other < 0) | allowed[scenes.other.long().clamp(min=0)]
            kind[..., 1] = torch.where(fits, COLORS.index(word), kind[..., 1])
            if turn is not None:
                turn[fits] = 0
    return dataclasses.replace(scenes, kind=kind, ground=ground, turn=turn)


def scores(model: Any, per_tag: int, size: int, pool: Executor | None = None) -> dict[str, float]:
    """`vae.detector_scores` on prompts that are not the reported ones, and the least dB of `scenes.weakest`; the first
    process's, for all."""
    found: list[dict[str, float]] = [{}]
    if rank() == 0:
        shares = vae.detector_scores(model, per_tag, size, SCORE_SEED, pool)
        worst = weakest(lambda x: vae.round_trip(model, x), size)[0]
        found = [{k: round(v, 4) for k, v in shares.items()} | {"weakest": worst[0]}]
    if world_size() > 1:
        dist.broadcast_object_list(found, 0)
    return found[0]


def share(model: Any) -> None:
    """Give every process the first one's VAE: rounding may differ between GPUs."""
    if world_size() > 1:
        for p in model.parameters():
            dist.broadcast(p.data, 0)
        values = [model.config.shift_factor, model.config.scaling_factor]
        dist.broadcast_object_list(values, 0)
        model.register_to_config(shift_factor=values[0], scaling_factor=values[1])


def load(folder: Path) -> Any:
    """The VAE that a run's folder holds (`vae.safetensors`, `vae.json`), on the CPU."""
    model = models.build_vae()
    model.load_state_dict(load_file(folder / "vae.safetensors"))
    statistics = json.loads((folder / "vae.json").read_text())
    model.register_to_config(shift_factor=statistics["shift"], scaling_factor=statistics["scale"])
    return model.eval()


def save(model: Any, folder: Path) -> None:
    """Write what `load` reads."""
    path = folder / "vae.safetensors"
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)
    statistics = {"shift": model.config.shift_factor, "scale": model.config.scaling_factor}
    write_atomic(folder / "vae.json", json.dumps(statistics).encode())


def _worst(shares: dict[str, float]) -> float:
    return min(v for k, v in shares.items() if k not in ("psnr", "weakest", "ghosts"))


def _kept(before: dict[str, float], after: dict[str, float]) -> bool:
    """Whether a VAE that was trained on is the better one."""
    fewer = after["ghosts"] < before["ghosts"]
    lost = before["weakest"] - after["weakest"]
    return (
        _worst(after) >= _worst(before) - CHANCE
        and lost <= (PRICE if fewer else 0)
        and (fewer or after["ghosts"] <= before["ghosts"] + CHANCE)
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tritflow.training.autoencoder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="RUN", help="folder of a training run, a pipeline folder, or 'small'")
    parser.add_argument("--out", type=Path, help="folder of the run that takes the VAE (default: RUN itself)")
    parser.add_argument(
        "--encoder", action="store_true", help="train the encoder too; the flow must be trained on afterwards"
    )
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--examples", type=int, default=60_000, help="pictures it is trained on")
    mixture_arguments(parser, overlapping=0.5)
    parser.add_argument(
        "--focus", default="", metavar="WORDS", help="what half of the scenes show, such as 'green checkered black'"
    )
    parser.add_argument("--way", type=float, default=1.0, help="share of the way from the old weights to the new ones")
    parser.add_argument("--edges", type=float, default=vae.EDGE_WEIGHT, help="extra weight where two hues meet")
    parser.add_argument("--marks", type=float, default=vae.MARK_WEIGHT, help="weight of what is seen on the ground")
    parser.add_argument(
        "--stained", type=float, default=0.0, help="share of pictures, the most marked, in half a batch"
    )
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--per-tag", type=int, default=200, help="prompts a tag for the detector, before and after")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 4))
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    try:
        model, out = _source(args.source, args.out)
    except start.StartError as error:
        parser.error(str(error))
    mixture = mixture_of(parser, args)
    check_shares(parser, args, "stained", "way")
    if args.encoder and args.way < 1:
        parser.error("--way is for a decoder alone: between two encoders lie latents that neither decoder knows")
    try:
        focused(SceneBatch.from_scenes([]), args.focus)
    except ValueError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    usual = dataclasses.replace(mixture, overlapping=0.0)
    with ProcessPoolExecutor(max(1, args.workers), mp_context=get_context("spawn")) as pool:
        report = train_further(
            model,
            focused(data.Order(pool, args.examples, SEED, mixture).all().scenes, args.focus),
            usual=data.Order(pool, min(4096, args.examples), SEED + 1, usual).all().scenes,
            seconds=args.seconds,
            size=args.size,
            device=device,
            encoder=args.encoder,
            way=args.way,
            per_tag=args.per_tag,
            pool=pool,
            batch=args.batch,
            peak=args.peak,
            edges=args.edges,
            marks=args.marks,
            stained=args.stained,
            compile=not args.no_compile and device.type == "cuda",
            log=lambda text: print(text, flush=True),
        )
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "autoencoder.json", (json.dumps(report, indent=1) + "\n").encode())
    if report["kept"] or not (out / "vae.safetensors").is_file():
        save(model, out)
    if report["kept"] and args.encoder:
        print(f"latents have moved: train the flow on (python -m tritflow.training --out {out} ...)", flush=True)


def _source(name: str, out: Path | None) -> tuple[Any, Path]:
    """The VAE that `name` means, and the run's folder that takes it. Raises `StartError` where there is none."""
    folder = Path(name)
    if (folder / "vae.safetensors").is_file() and (folder / "vae.json").is_file():
        return load(folder), out or folder
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise start.StartError(f"{folder} holds no vae.safetensors with its vae.json; train the VAE first")
    pipeline = start.folder_of(name)
    if out is None:
        raise start.StartError(f"--out is missing: '{name}' is a pipeline, and its VAE goes into a run's folder")
    return start.vae_of(pipeline), out


if __name__ == "__main__":
    main()
