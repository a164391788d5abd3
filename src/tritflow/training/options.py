"""The command line of `python -m tritflow.training`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from tritflow.training.data import Mixture
from tritflow.training.start import StartError, folder_of


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked; argparse prints what is wrong and exits with 2."""
    parser = argparse.ArgumentParser(
        prog="python -m tritflow.training",
        description="Train the small FLUX and its VAE from nothing but the built-in world, or on from a kept one.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, logs and the pipeline")
    parser.add_argument("--size", type=int, default=128, help="side of the pictures in pixels")
    parser.add_argument("--examples", type=int, default=300_000, help="scenes rendered and encoded a GPU")
    mixture_arguments(parser)
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="start with VAE, text encoders and transformer of a pipeline folder, or of 'small'",
    )
    parser.add_argument("--vae-seconds", type=float, default=300, help="where there is none to start with")
    parser.add_argument(
        "--vae-further-seconds",
        type=float,
        default=120,
        help="then both halves on scenes half of which overlap, unless OUT has an autoencoder.json (0: not at all)",
    )
    parser.add_argument("--probe-seconds", type=float, default=0, help="two GPUs: AdamW and Muon side by side first")
    parser.add_argument(
        "--reading-seconds",
        type=float,
        help="text encoders alone, before the flow (45; kept encoders: 0, and at a tenth of the rate)",
    )
    parser.add_argument("--reading-floor", type=float, default=0.97, help="go on only if this share is read rightly")
    parser.add_argument("--flow-seconds", type=float, default=1200)
    parser.add_argument("--guidance-seconds", type=float, default=180)
    parser.add_argument("--optimizer", choices=["muon", "adamw"], default="muon")
    parser.add_argument("--batch", type=int, default=512, help="pictures a step and GPU")
    parser.add_argument("--peak", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--decay", type=float, default=0.3, help="share of the flow's time in which the rate falls")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a flow-*.safetensors checkpoint to go on from")
    parser.add_argument("--guidance-scale", type=float, default=3.0, help="default of the written pipeline")
    parser.add_argument("--keep-every", type=float, default=0, help="seconds between kept weights (0: only the last)")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-graph", action="store_true", help="do not capture the step in CUDA graphs")
    args = parser.parse_args(argv)
    if args.size < 32 or args.size % 16:
        parser.error(f"--size {args.size}: pictures are cut into 16-pixel patches; give a multiple of 16 from 32 on")
    for name in ("examples", "batch", "peak", "vae_seconds", "flow_seconds"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: give a number above 0")
    check_shares(parser, args, "decay")
    args.mixture = mixture_of(parser, args)
    if args.start is not None:
        try:
            folder_of(args.start)
        except StartError as error:
            parser.error(f"--from: {error}")
    if args.resume is not None and not args.resume.is_file():
        parser.error(f"--resume {args.resume}: no such checkpoint")
    return args


def mixture_arguments(parser: argparse.ArgumentParser, overlapping: float = 0.0) -> None:
    """The options of a `Mixture`, and the default of one."""
    parser.add_argument("--tinted", type=float, default=0.4, help="share of scenes in hues that no word names")
    parser.add_argument("--blended", type=float, default=0.4, help="share of scenes in shapes that no word names")
    parser.add_argument(
        "--overlapping",
        type=float,
        default=overlapping,
        help=f"share of scenes in front of each other, beyond the usual .08 (default: {overlapping:g})",
    )
    parser.add_argument("--counting", type=float, default=0.25, help="share of the blended scenes that only count")


def mixture_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Mixture:
    """What those options say, refused in argparse's way where they are no shares."""
    check_shares(parser, args, "tinted", "blended", "overlapping", "counting")
    return Mixture(args.tinted, args.blended, args.overlapping, args.counting)


def check_shares(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """Refuse options that are no shares, in argparse's way."""
    for name in names:
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} {getattr(args, name)}: give a share from 0 to 1")
