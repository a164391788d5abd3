"""`python -m tritflow.training`: train the small FLUX, from nothing or from a kept one. See `--help`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tritflow.scenes.grammar import WORDS
from tritflow.training import data, models, stages
from tritflow.training.loop import rank, world_size
from tritflow.training.options import arguments
from tritflow.training.run import Run


def main(argv: Sequence[str] | None = None) -> None:
    """All stages, one after the other."""
    args = arguments(argv)
    run = Run(args)
    run.log(f"{world_size()} x {run.device}, torch {torch.__version__}, {len(WORDS)} words")
    autoencoder, order = stages.make_vae(run)
    examples = order.all()
    run.log(f"{len(examples)} examples")
    latents = data.encode_set(examples, autoencoder, args.size, run.device)
    run.log(f"encoded {tuple(latents.latents.shape)} std {float(latents.latents[:10000].float().std()):.3f}")
    model = stages.build(run)
    run.log(f"transformer {models.parameter_count(model.transformer):,} parameters")
    stages.train_flow(run, model, latents, autoencoder)
    if rank() == 0:
        stages.finish(run, model, autoencoder)
    run.close()


if __name__ == "__main__":
    main()
