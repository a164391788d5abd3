"""Train the small FLUX's VAE on rendered scenes: absolute error, more on objects and edges, a little KL."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tritflow.scenes import SceneBatch, detect, judge, scene_of
from tritflow.scenes.grammar import TAGS
from tritflow.scenes.held_out import evaluation_prompts
from tritflow.scenes.render import render
from tritflow.training.data import render_all
from tritflow.training.loop import Trainer, rank

KL_WEIGHT = 3e-4
OBJECT_WEIGHT = 4.0


def reconstruction_loss(image: Tensor, output: Tensor) -> Tensor:
    """Mean absolute error with object pixels weighted up, plus that of horizontal and vertical differences: thin
    stripes and corners live in the differences."""
    weight = 1 + OBJECT_WEIGHT * (image.amax(1, keepdim=True) - image.amin(1, keepdim=True) > 0.34).float()
    loss = (weight * (image - output).abs()).mean() / weight.mean()
    for axis in (-1, -2):
        loss = loss + 0.5 * (image.diff(dim=axis) - output.diff(dim=axis)).abs().mean()
    return loss


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
    log: Any = print,
) -> None:
    """Train in place for `seconds`, then set `scaling_factor` and `shift_factor` from the data's latents.

    `decoder_only`: latents stay what they are, so that a flow trained on them still fits.
    """
    pictures = render_all(scenes, size, device)
    vae.to(device)
    if device.type == "cuda":
        vae.to(memory_format=torch.channels_last)
    encoder = torch.compile(vae.encoder) if compile else vae.encoder
    decoder = torch.compile(vae.decoder) if compile else vae.decoder

    def loss() -> Tensor:
        index = torch.randint(len(pictures), (batch,), device=device)
        image = pictures[index].float() / 127.5 - 1
        if device.type == "cuda":
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            with torch.set_grad_enabled(not decoder_only):
                mean, logvar = encoder(image).chunk(2, dim=1)
            mean, logvar = mean.float(), logvar.float().clamp(-20, 10)
            output = decoder(mean + torch.randn_like(mean) * (0.5 * logvar).exp())
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return reconstruction_loss(image, output.float()) + KL_WEIGHT * kl

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
        set_latent_statistics(vae, pictures[:4096])


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


def detector_scores(vae: Any | None, per_tag: int, size: int, seed: int = 0) -> dict[str, float]:
    """Share of true renders of held-out prompts that the detector reads right, per tag; after the VAE's round trip
    if a VAE is given, with the reconstruction's PSNR in dB under `psnr`."""
    scores: dict[str, float] = {}
    errors = []
    for tag in TAGS:
        prompts = evaluation_prompts(per_tag, seed, (tag,))
        images = render(SceneBatch.from_scenes([scene_of(p, seed) for p in prompts]), size)
        shown = images if vae is None else round_trip(vae, images)
        errors.append((shown - images).square().mean((1, 2, 3)))
        pixels = (shown.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
        scores[tag] = sum(judge(p, detect(x)).passed for p, x in zip(prompts, pixels, strict=True)) / per_tag
    if vae is not None:
        scores["psnr"] = float(-10 * torch.cat(errors).clamp_min(1e-10).log10().mean())
    return scores
