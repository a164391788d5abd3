"""Train the small FLUX's VAE on rendered scenes: absolute error, more on objects and edges, a little KL."""

from __future__ import annotations

from concurrent.futures import Executor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tritflow.scenes import GHOSTS, Prompt, SceneBatch, detect, judge, marked, scene_of
from tritflow.scenes.grammar import TAGS
from tritflow.scenes.held_out import evaluation_prompts
from tritflow.scenes.render import render
from tritflow.training.data import render_all
from tritflow.training.loop import Trainer, rank

KL_WEIGHT = 3e-4
OBJECT_WEIGHT = 4.0
# The detector's misses after the round trip were hues mixed where one object covers another.
EDGE_WEIGHT = 8.0
# Chroma of what is an object, as the detector has it, in pictures from -1 to 1.
OBJECT_CHROMA = 0.34
# Error of a ground's pixel, of 2, above which it is a mark that is seen: 2 of 255; and what the excess weighs. Left
# alone, a decoder may leave spots beside objects on gray, which absolute error hardly notices.
SEEN, MARK_WEIGHT = 4 / 255, 20.0
# Pictures that the detector reads at a time.
READ = 25
# Two hues' directions differ by more than this in one channel; one hue in another brightness does not.
HUES_APART = 0.35


def objects(image: Tensor) -> Tensor:
    """Where objects are: bool [B, 1, H, W] of pictures [B, 3, H, W] in -1..1."""
    return image.amax(1, keepdim=True) - image.amin(1, keepdim=True) > OBJECT_CHROMA


def two_hue_edges(image: Tensor) -> Tensor:
    """Where objects of two hues meet: bool [B, 1, H, W] of pictures [B, 3, H, W] in -1..1.

    A pixel whose 5 x 5 neighbourhood holds object pixels of hues that lie apart. Texture and ground have no part in it:
    they change brightness, not hue.
    """
    away, there = image - image.mean(1, keepdim=True), objects(image)
    hue = away / away.norm(dim=1, keepdim=True).clamp(min=1e-6)
    nothing = -2.0 * torch.ones_like(hue)
    most = F.max_pool2d(torch.where(there, hue, nothing), 5, 1, 2)
    least = -F.max_pool2d(torch.where(there, -hue, nothing), 5, 1, 2)
    # With no object about, most is -2 and least 2.
    return (most - least).amax(1, keepdim=True) > HUES_APART


def reconstruction_loss(
    image: Tensor, output: Tensor, edges: float = EDGE_WEIGHT, marks: float = MARK_WEIGHT
) -> Tensor:
    """Mean absolute error with object pixels weighted up and, by `edges` more, those where two hues meet; plus that of
    horizontal and vertical differences: thin stripes and corners live in the differences. `marks`: weight of what the
    ground's pixels are off beyond what nobody sees."""
    there = objects(image)
    weight = 1 + OBJECT_WEIGHT * there.float()
    if edges:
        weight = weight + edges * two_hue_edges(image).float()
    loss = (weight * (image - output).abs()).mean() / weight.mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * (image.diff(dim=axis) - output.diff(dim=axis)).abs().mean()
    if marks:
        loss = loss + marks * stains(image, output, there).mean()
    return loss


def stains(image: Tensor, output: Tensor, there: Tensor) -> Tensor:
    """What each picture's ground, where no objects are, is off beyond what nobody sees [B]."""
    near = F.max_pool2d(there.float(), 5, 1, 2)  # soft edges are no marks
    return ((1 - near) * ((image - output).abs() - SEEN).clamp(min=0)).mean((1, 2, 3))


def train_vae(
    vae: Any,
    scenes: SceneBatch,
    *,
    seconds: float,
    size: int,
    device: torch.device,
    batch: int = 128,
    peak: float = 1.5e-3,
    compile: bool = True,
    decoder_only: bool = False,
    usual: SceneBatch | None = None,
    edges: float = EDGE_WEIGHT,
    marks: float = MARK_WEIGHT,
    stained: float = 0.0,
    log: Any = print,
) -> None:
    """Train in place for `seconds`, then set `scaling_factor` and `shift_factor` from the latents of `usual` scenes, as
    the flow will see them (None: from `scenes`).

    `decoder_only`: latents stay what they are, so that a flow trained on them still fits. `edges` and `marks`: for
    `reconstruction_loss`. `stained`: share of the pictures, those whose ground the VAE stains most as it is, of which
    half of every batch is.
    """
    pictures = render_all(scenes, size, device)
    vae.to(device)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    encoder = torch.compile(vae.encoder) if compile else vae.encoder
    decoder = torch.compile(vae.decoder) if compile else vae.decoder

    worst = None
    if stained:
        stain = torch.cat([_stains_of(vae, part) for part in pictures.split(256)])
        worst = stain.topk(max(1, round(stained * len(pictures)))).indices
        log(f"vae: stains of {len(worst)} pictures {float(stain[worst].mean()):.2e}, of all {float(stain.mean()):.2e}")

    def loss() -> Tensor:
        index = torch.randint(len(pictures), (batch,), device=device)
        if worst is not None:
            index[::2] = worst[torch.randint(len(worst), index[::2].shape, device=device)]
        image = pictures[index].float() / 127.5 - 1
        if device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            with torch.set_grad_enabled(not decoder_only):
                mean, logvar = encoder(image).chunk(2, dim=1)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            output = decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(image, output.float(), edges, marks) + KL_WEIGHT * kl

    trained = vae.decoder if decoder_only else vae
    trainer = Trainer(loss, list(trained.parameters()), peak=peak, ema=0.998, clip=1.0, graph=False)
    steps = trainer.run(
        seconds,
        warmup=100,
        decay=0.5,
        report=lambda s, value, rate: log(f"vae: step {s} loss {value:.4f} rate {rate:.2f}") if rank() == 0 else None,
    )
    trainer.load_average()
    log(f"vae: {steps} steps of {batch}")
    if not decoder_only:
        shown = pictures if usual is None else render_all(usual[slice(0, 4096)], size, device)
        set_latent_statistics(vae, shown[:4096])


def _stains_of(vae: Any, pictures: Tensor) -> Tensor:
    """`stains` [B] of the round trip of bytes [B, 3, H, W]."""
    shown = pictures.float() / 255
    image, output = (x * 2 - 1 for x in (shown, round_trip(vae, shown).to(shown)))
    return stains(image, output, objects(image))


@torch.no_grad()
def set_latent_statistics(vae: Any, pictures: Tensor) -> None:
    """Write the shift and scale that make the data's latents zero mean and unit variance into the VAE's config."""
    means = []
    for i in range(0, len(pictures), 256):
        means.append(vae.encode(pictures[i : i + 256].float() / 127.5 - 1).latent_dist.mean.float())
    latents = torch.cat(means)
    vae.register_to_config(
        shift_factor=round(float(latents.mean()), 5), scaling_factor=round(1 / float(latents.std()), 5)
    )


@torch.no_grad()
def round_trip(vae: Any, images: Tensor) -> Tensor:
    """Encode and decode pictures [B, 3, H, W] in 0..1: float, clamped to 0..1."""
    parameter = next(vae.parameters())
    out = []
    for i in range(0, len(images), 64):
        x = (images[i : i + 64] * 2 - 1).to(parameter.device, parameter.dtype)
        out.append((vae.decode(vae.encode(x).latent_dist.mean).sample.float() / 2 + 0.5).clamp(0, 1).cpu())
    return torch.cat(out)


def detector_scores(
    vae: Any | None, per_tag: int, size: int, seed: int = 0, pool: Executor | None = None
) -> dict[str, float]:
    """Share of true renders of held-out prompts that the detector reads right, per tag; after the VAE's round trip
    if a VAE is given, with the reconstruction's PSNR in dB under `psnr` and the share of pictures with marks on the
    ground under `ghosts`. `pool` reads pictures side by side."""
    tasks = [(tag, per_tag, i, min(per_tag, i + READ), size, seed) for tag in TAGS for i in range(0, per_tag, READ)]
    each: Any = map if pool is None else pool.map
    seen: dict[str, list[_Seen]] = {tag: [] for tag in TAGS}
    errors, shown = [], []
    for images in each(_true_renders, tasks):
        pictures = torch.from_numpy(images) / 255
        again = pictures if vae is None else round_trip(vae, pictures)
        errors.append((again - pictures).square().mean((1, 2, 3)))
        shown.append((again.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy())
    for task, found in zip(tasks, each(_read, list(zip(tasks, shown, strict=True))), strict=True):
        seen[task[0]] += found
    scores = {tag: sum(right for right, _ in found) / per_tag for tag, found in seen.items()}
    if vae is not None:
        scores["psnr"] = float(-10 * torch.cat(errors).clamp_min(1e-10).log10().mean())
        scores["ghosts"] = sum(ghosts for found in seen.values() for _, ghosts in found) / (per_tag * len(TAGS))
    return scores


_Seen = tuple[bool, bool]
"""Whether the detector reads a picture right, and whether it has ghosts."""
_Some = tuple[str, int, int, int, int, int]
"""A tag, its prompts, the first and the last of them to take, the pictures' size and the seed."""


@lru_cache(maxsize=2)
def _tag_prompts(tag: str, per_tag: int, seed: int) -> tuple[Prompt, ...]:
    return tuple(evaluation_prompts(per_tag, seed, (tag,)))


def _prompts(task: _Some) -> tuple[Prompt, ...]:
    tag, per_tag, first, last, _, seed = task
    return _tag_prompts(tag, per_tag, seed)[first:last]


def _true_renders(task: _Some) -> np.ndarray:
    torch.set_num_threads(1)  # many of these run side by side
    scenes = SceneBatch.from_scenes([scene_of(p, task[5]) for p in _prompts(task)])
    pictures: np.ndarray = (render(scenes, task[4]) * 255).round().to(torch.uint8).numpy()
    return pictures


def _read(task: tuple[_Some, np.ndarray]) -> list[_Seen]:
    torch.set_num_threads(1)
    pictures = zip(_prompts(task[0]), task[1], strict=True)
    return [(judge(p, detect(x)).passed, marked(x) > GHOSTS) for p, x in pictures]
