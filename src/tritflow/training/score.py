"""Score the small FLUX while it trains: draw held-out prompts, read the pictures back, count per tag."""

from __future__ import annotations

from concurrent.futures import Executor
from typing import Any

import torch

from tritflow.scenes import Prompt, detect, judge
from tritflow.scenes.grammar import GENEVAL_TAGS
from tritflow.training.data import tokenize, unpack
from tritflow.training.flow import SmallFlux, sample, shift_of
from tritflow.training.models import LATENT_CHANNELS


def _judge(task: tuple[list[Prompt], Any]) -> list[bool]:
    torch.set_num_threads(1)  # many of these run side by side
    prompts, pixels = task
    return [judge(p, detect(x)).passed for p, x in zip(prompts, pixels, strict=True)]


@torch.no_grad()
def draw(
    model: SmallFlux,
    vae: Any,
    tokenizers: tuple[Any, Any],
    texts: list[str],
    *,
    size: int,
    batch: int = 256,
    **sampling: Any,
) -> torch.Tensor:
    """Pictures uint8 [N, H, W, 3] on the CPU; `sampling` goes to `flow.sample`."""
    device = next(model.parameters()).device
    side = size // 16
    clip_ids, t5_ids = (x.to(device) for x in tokenize(texts, *tokenizers))
    empty_clip, empty_t5 = (x.to(device) for x in tokenize([""], *tokenizers))
    pictures = []
    seed = sampling.pop("seed", 0)
    for i in range(0, len(texts), batch):
        here = slice(i, i + batch)
        x = sample(
            model,
            clip_ids[here],
            t5_ids[here],
            (empty_clip, empty_t5),
            side=side,
            channels=LATENT_CHANNELS * 4,
            shift=shift_of(side),
            seed=seed + i,
            **sampling,
        )
        latents = unpack(x, 2 * side, 2 * side) / vae.config.scaling_factor + vae.config.shift_factor
        images = vae.decode(latents.to(next(vae.parameters()).dtype)).sample.float()
        pictures.append(((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu())
    return torch.cat(pictures)


def score(
    model: SmallFlux,
    vae: Any,
    tokenizers: tuple[Any, Any],
    prompts: list[Prompt],
    *,
    size: int,
    pool: Executor | None = None,
    **sampling: Any,
) -> dict[str, float]:
    """Share of passed pictures per tag, one picture a prompt, and `overall`: the mean over GenEval's six tags."""
    pixels = draw(model, vae, tokenizers, [p.text for p in prompts], size=size, **sampling).numpy()
    chunks = [(prompts[i : i + 16], pixels[i : i + 16]) for i in range(0, len(prompts), 16)]
    results = list(pool.map(_judge, chunks)) if pool is not None else [_judge(c) for c in chunks]
    passed = [ok for part in results for ok in part]
    scores: dict[str, float] = {}
    for tag in dict.fromkeys(p.tag for p in prompts):
        own = [ok for p, ok in zip(prompts, passed, strict=True) if p.tag == tag]
        scores[tag] = sum(own) / len(own)
    judged = [scores[t] for t in GENEVAL_TAGS if t in scores]
    if judged:
        scores["overall"] = sum(judged) / len(judged)
    return scores
