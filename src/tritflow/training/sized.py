"""A teacher of another size: the small FLUX's text encoders and VAE around a transformer trained from nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from tritflow.calibration.artifacts import provenance, read_json, write_json
from tritflow.distillation.step import training_attention
from tritflow.training import data, flow, models
from tritflow.training.export import export_pipeline
from tritflow.training.start import check_words, folder_of
from tritflow.training.supply import Supply
from tritflow.training.words import InventedWords

# Two to one blocks as FLUX.1-dev, heads of 64 channels; transformer parameters in millions by name.
SIZES = {
    "2M": models.SmallFluxSize(hidden=128, heads=2, double=2, single=4),
    "5M": models.SmallFluxSize(hidden=192, heads=3, double=2, single=4),
    "14M": models.SmallFluxSize(),
    "40M": models.SmallFluxSize(hidden=384, heads=6, double=4, single=8),
}
# Of the time, for guidance.
GUIDANCE = 0.15
# As `python -m tritflow.training` mixes them.
MIXTURE = data.Mixture(tinted=0.4, blended=0.4)


def train_sized(
    size: models.SmallFluxSize,
    out: Path,
    *,
    base: str | Path = "small",
    seconds: float,
    examples: int = 200_000,
    batch: int = 512,
    pixels: int = 0,
    seed: int = 0,
    device: torch.device | str = "cpu",
    log: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Train a transformer and write `out`, a pipeline folder; what is finished is not made again.

    Args:
        size: of the transformer; what it says of text is the base's.
        out: the folder to write. Its meta.json comes last.
        base: pipeline folder whose text encoders, tokenizers and VAE are used as they are.
        seconds: of training, guidance included.
        examples: scenes encoded at once; others follow meanwhile.
        batch: pictures a step.
        pixels: side of the pictures (0: the base's own).
        seed: of weights and examples.
        device: where to train.
        log: takes a line now and then.

    Returns:
        `out/meta.json`: parameters, steps, loss.

    Raises:
        StartError: the base is no pipeline folder, or its vocabulary is not that of the captions.
    """
    from diffusers import FluxPipeline

    if (out / "meta.json").is_file():
        found: dict[str, Any] = read_json(out / "meta.json")
        return found
    device = torch.device(device)
    root = folder_of(str(base))
    check_words(root, data.word_tokenizers())  # examples are made in workers, with tokenizers of their own
    pixels = pixels or int(read_json(root / "generation.json")["height"])
    pipe: Any = FluxPipeline.from_pretrained(root, torch_dtype=torch.float32, use_safetensors=True)
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2)
    scenes = data.make_examples(examples, seed=1 + seed, workers=_workers(examples), mixture=MIXTURE)
    vae = pipe.vae.to(device).eval().requires_grad_(False)
    latents = data.encode_set(scenes, vae, pixels, device)
    torch.manual_seed(seed + 1)
    clip, t5 = pipe.text_encoder, pipe.text_encoder_2
    transformer = models.build_transformer(_around(size, clip, t5))
    model = flow.SmallFlux(clip.requires_grad_(False), t5.requires_grad_(False), transformer).to(device)
    count = models.parameter_count(transformer)
    log(f"transformer {count:,} parameters, {len(latents.latents)} examples")
    on_gpu = device.type == "cuda"
    common: dict[str, Any] = {"side": pixels // 16, "batch": batch, "compile": on_gpu, "graph": on_gpu}
    last: dict[str, Any] = {}
    with training_attention(device), ProcessPoolExecutor(_workers(examples), mp_context=get_context("spawn")) as pool:
        supply = Supply(pool, 1 + seed, len(latents.latents), MIXTURE)

        def report(steps: int, loss: float, rate: float) -> None:
            fresh = supply.refill(latents, vae, pixels)
            last.update(steps=steps, loss=loss)
            log(f"step {steps} loss {loss:.4f} rate {rate:.2f}, {fresh} fresh examples")

        words = InventedWords(*tokenizers).to(device)
        flow.train_flow(
            model,
            latents,
            seconds=seconds * (1 - GUIDANCE),
            words=words,
            nouns=False,
            colors=False,
            log=report,
            **common,
        )
        supply.close()
        flow.distil_guidance(model, latents, seconds=seconds * GUIDANCE, **common)
    _uncompile(model)
    export_pipeline(out, model, vae, tokenizers, pixels, 3.0)
    meta = {
        "kind": "sized teacher",
        "parameters": count,
        "seconds": seconds,
        "seed": seed,
        **last,
        **provenance(device),
    }
    write_json(out / "meta.json", meta)
    return meta


def _around(size: models.SmallFluxSize, clip: Any, t5: Any) -> models.SmallFluxSize:
    """The size with the widths that text really has."""
    return models.SmallFluxSize(
        size.hidden, size.heads, size.double, size.single,
        text_width=t5.config.d_model, pooled_width=clip.config.hidden_size,
    )  # fmt: skip


def _workers(examples: int) -> int:
    return max(1, min(12, (os.cpu_count() or 2) - 1, examples // data.CHUNK + 1))


def _uncompile(model: torch.nn.Module) -> None:
    for module in model.modules():
        module._compiled_call_impl = None  # else it is saved under other names
