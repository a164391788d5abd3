"""How well the scenes detector reads true pictures, before and after a round trip through a VAE.

The scenes suite is only as good as its detector: a true render that it misreads costs every model the same score.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tritflow.evaluation import statistics
from tritflow.evaluation.api import EvaluationError, Progress
from tritflow.pipelines.loading import load_pipeline, pick_device, quiet
from tritflow.results import provenance
from tritflow.scenes import TAGS, SceneBatch, detect, evaluation_prompts, judge, render, scene_of, weakest

RoundTrip = Callable[[Tensor], Tensor]
"""Pixels float [B, 3, H, W] in 0..1 to pixels of the same shape, as a VAE's encoder and decoder make them."""


def vae_round_trip(model: str, device: str = "cpu") -> tuple[RoundTrip, str]:
    """Encoder and decoder of a pipeline's VAE in float32, and the device they are on.

    Raises `ModelError` or `DeviceError` when either is not there.
    """
    on = str(pick_device(device))
    with quiet():
        vae: Any = load_pipeline(model, device="cpu", dtype="float32").vae.to(on)

    @torch.no_grad()
    def round_trip(pixels: Tensor) -> Tensor:
        latents = vae.encode(pixels * 2 - 1).latent_dist.mean
        decoded: Tensor = vae.decode(latents).sample
        return (decoded / 2 + 0.5).clamp(0, 1)

    return round_trip, on


def summary(run: dict[str, Any]) -> str:
    """A run of `read_back` in plain text."""
    lines = [f"{run['prompts']['count']} pictures of {run['size']} pixels; share that is read right, 95 % intervals"]
    for tag, kinds in run["tags"].items():
        shares = "".join(f"  {k} {v['value']:.1%} [{v['low']:.1%}, {v['high']:.1%}]" for k, v in kinds.items())
        lines.append(f"  {tag:14}{shares}")
    if "weakest" in run:
        worst = ", ".join(f"{w['name']} {w['psnr']:.1f} dB" for w in run["weakest"]["worst"])
        lines.append(f"  drawn worst after the VAE: {worst}; median {run['weakest']['median']:.1f} dB")
    return "\n".join(lines)


def read_back(
    per_tag: int = 200,
    size: int = 128,
    round_trip: RoundTrip | None = None,
    *,
    seed: int = 0,
    tags: Sequence[str] = TAGS,
    batch_size: int = 64,
    device: str = "cpu",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Pass rates of true renders of evaluation prompts, per tag, as a run of the topic "detector".

    Returns plain JSON: `tags[TAG]["renders"]` and, with a `round_trip`, `tags[TAG]["vae"]`, with Wilson's intervals
    (one picture a prompt); `failures` holds the first reasons of each tag, `weakest`, with a `round_trip`, the five
    colours, textures and grounds that it keeps worst, by PSNR in dB of objects' pixels, and the median of all (on as
    many scenes as prompts a tag, 12 at most).
    Raises `EvaluationError` when `round_trip` changes the shape.
    """
    prompts = evaluation_prompts(per_tag, seed=seed, tags=tuple(tags))
    kinds = ["renders", *(["vae"] if round_trip is not None else [])]
    passed: dict[str, dict[str, list[bool]]] = {t: {k: [] for k in kinds} for t in tags}
    failures: dict[str, list[str]] = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        pixels = render(SceneBatch.from_scenes([scene_of(p, seed + start + i) for i, p in enumerate(batch)]), size)
        shown = {"renders": pixels}
        if round_trip is not None:
            shown["vae"] = round_trip(pixels.to(device)).float().cpu()
            if shown["vae"].shape != pixels.shape:
                raise EvaluationError(
                    f"the round trip made {tuple(shown['vae'].shape)} of {tuple(pixels.shape)} pixels"
                )
        for kind, pictures in shown.items():
            bytes_ = (pictures.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            for prompt, picture in zip(batch, bytes_, strict=True):
                verdict = judge(prompt, detect(picture))
                passed[prompt.tag][kind].append(verdict.passed)
                if not verdict.passed and len(failures.setdefault(f"{prompt.tag}, {kind}", [])) < 5:
                    failures[f"{prompt.tag}, {kind}"].append(f"{prompt.text}: {verdict.reason}")
        if progress is not None:
            progress(min(start + batch_size, len(prompts)), len(prompts))
    ids = [str(i) for i in range(per_tag)]
    kept: dict[str, Any] = {}
    if round_trip is not None:
        trip = round_trip
        found = weakest(lambda pixels: trip(pixels.to(device)), size, pictures=min(per_tag, 12))
        worst = [{"name": name, "psnr": db} for db, name in found[:5]]
        kept = {"weakest": {"worst": worst, "median": found[len(found) // 2][0]}}
    return {
        "label": "scenes detector",
        "size": size,
        "prompts": {"count": len(prompts), "samples": 1},
        "tags": {
            tag: {k: statistics.clustered_proportion(v, ids).to_dict() for k, v in kinds_of.items()}
            for tag, kinds_of in passed.items()
        },
        "failures": failures,
        **kept,
        **provenance(device),
    }
