"""`python -m tritflow.training.decoder RUN`: train the VAE's decoder of a run further, beside or after the flow.

The encoder and the latents' statistics stay, so the flow need not know; the run's last stage takes the decoder that
then lies in its folder.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from tritflow.formats.atomic import write_atomic
from tritflow.training import data, vae
from tritflow.training.watch import load_vae

SEED = 5_000_011  # scenes that neither the VAE nor the flow has seen


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tritflow.training.decoder", description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a training run, with vae.safetensors and vae.json")
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--examples", type=int, default=100_000, help="pictures it is trained on")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--peak", type=float, default=5e-4, help="learning rate")
    parser.add_argument("--per-tag", type=int, default=200, help="prompts a tag for the detector, before and after")
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 4))
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args(argv)
    missing = [name for name in ("vae.safetensors", "vae.json") if not (args.run / name).is_file()]
    if missing:
        parser.error(f"{args.run / missing[0]}: no such file; train the VAE first (python -m tritflow.training)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(SEED)
    model = load_vae(args.run, device)
    before = vae.detector_scores(model, args.per_tag, args.size)
    print(f"detector after the round trip, before: {json.dumps(before)}", flush=True)
    vae.train_vae(
        model.train(),
        data.make_examples(args.examples, SEED, args.workers).scenes,
        seconds=args.seconds,
        size=args.size,
        device=device,
        batch=args.batch,
        peak=args.peak,
        compile=not args.no_compile and device.type == "cuda",
        decoder_only=True,
        log=lambda text: print(text, flush=True),
    )
    after = vae.detector_scores(model.eval(), args.per_tag, args.size)
    print(f"detector after the round trip, after: {json.dumps(after)}", flush=True)
    write_atomic(args.run / "decoder.json", (json.dumps({"before": before, "after": after}, indent=1) + "\n").encode())
    if min(v for k, v in after.items() if k != "psnr") < min(v for k, v in before.items() if k != "psnr"):
        print("no better than before: vae.safetensors stays as it was", flush=True)
        return
    path = args.run / "vae.safetensors"
    save_file({k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


if __name__ == "__main__":
    main()
