"""Pictures from prompts, the same ones whatever the batch size and the device's random generator.

The noise of every picture is drawn on the CPU from the picture's own seed, so that two models, two batch sizes or
two devices start from identical latents and their pictures can be compared.
"""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from tritflow.formats.atomic import write_atomic
from tritflow.models import FLUX2
from tritflow.pipelines.loading import generation_defaults

MAX_TEXT_TOKENS = 512


class GenerationError(ValueError):
    """A size, a number of steps, a seed or a prompt that cannot be drawn. The message names the nearest valid one."""


class PromptWarning(UserWarning):
    """A prompt was changed on its way to the model (cut, or empty)."""


def picture_noise(seed: int, channels: int, height: int, width: int) -> Tensor:
    """Standard normal latents of one picture, drawn on the CPU.

    Args:
        seed: 0 <= seed < 2**63.
        channels: latent channels (16 for FLUX.1).
        height, width: of the latents, both even.

    Returns:
        fp32 [1, height/2 * width/2, 4 * channels], packed as FLUX's transformer takes them: 2x2 patches, with
        the channel before the position within the patch.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    noise = torch.randn(channels, height // 2, 2, width // 2, 2, generator=generator)
    return noise.permute(1, 3, 0, 2, 4).reshape(1, (height // 2) * (width // 2), channels * 4)


def check_size(pipe: Any, height: int, width: int) -> None:
    """Raise `GenerationError` unless both are positive multiples of the model's patch (16 pixels for FLUX.1)."""
    patch = 2 * pipe.vae_scale_factor
    for name, value in (("height", height), ("width", width)):
        if value < 1 or value % patch:
            below, above = value // patch * patch, (max(value, 0) // patch + 1) * patch
            near = f"{below} and {above}" if below > 0 else str(above)
            kind = "multiple" if value > 0 else "positive multiple"
            raise GenerationError(f"{name} {value} is not a {kind} of {patch}; the nearest valid: {near}")


@torch.no_grad()
def generate(
    pipe: Any,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    height: int | None = None,
    width: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    max_sequence_length: int | None = None,
    batch_size: int = 4,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture a prompt with a FLUX.1 or FLUX.2 pipeline's own sampler.

    Args:
        pipe: a `diffusers.FluxPipeline`, `Flux2Pipeline` or `Flux2KleinPipeline`, dense or ternary.
        prompts: one or many. An empty prompt is drawn, with a `PromptWarning`.
        seeds: of the noise, one a prompt, or one for all.
        height, width: pixels, multiples of 16; default: the model folder's own (`generation_defaults`), as for
            `num_inference_steps`, `guidance_scale` (embedded, but for undistilled klein) and `max_sequence_length`
            (text tokens).
        batch_size: pictures drawn at once.
        on_step: called as `on_step(done, total)` after every sampler step of every batch.

    Returns:
        As many RGB pictures as prompts, in order.

    Raises:
        GenerationError: what was asked cannot be drawn, or the model returned NaN.
    """
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    numbers = [seeds] * len(texts) if isinstance(seeds, int) else list(seeds)
    defaults = generation_defaults(pipe)
    height = defaults.height if height is None else height
    width = defaults.width if width is None else width
    steps = defaults.num_inference_steps if num_inference_steps is None else num_inference_steps
    guidance = defaults.guidance_scale if guidance_scale is None else guidance_scale
    tokens = defaults.max_sequence_length if max_sequence_length is None else max_sequence_length
    _check(texts, numbers, steps, guidance, tokens, batch_size)
    check_size(pipe, height, width)
    _warn_about(pipe, texts, tokens)

    latent_height, latent_width = (side // pipe.vae_scale_factor for side in (height, width))
    channels = pipe.transformer.config.in_channels // 4
    batches = [range(i, min(i + batch_size, len(texts))) for i in range(0, len(texts), batch_size)]
    total, done = steps * len(batches), 0

    def stepped(_pipe: Any, _step: int, _time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)
        return kwargs

    images: list[Image.Image] = []
    with _no_progress_bar(pipe):
        for batch in batches:
            noise = [picture_noise(numbers[i], channels, latent_height, latent_width) for i in batch]
            pictures = pipe(
                **_inputs(pipe, [texts[i] for i in batch], torch.cat(noise), latent_height, tokens),
                height=height,
                width=width,
                num_inference_steps=steps,
                guidance_scale=guidance,
                max_sequence_length=tokens,
                callback_on_step_end=stepped,
                output_type="pt",
            ).images
            if not bool(torch.isfinite(pictures).all()):
                raise GenerationError(
                    "the model returned NaN or infinity, so there is no picture to show; try --dtype bfloat16 or "
                    "float32, and `tritflow inspect` on the model"
                )
            images += pipe.image_processor.numpy_to_pil(pipe.image_processor.pt_to_numpy(pictures))
    return images


def _inputs(pipe: Any, texts: list[str], noise: Tensor, latent_height: int, tokens: int) -> dict[str, Any]:
    """Prompts and noise as the pipeline's family takes them."""
    if type(pipe.transformer).__name__ == FLUX2.transformer_class:
        # The same numbers as a picture of 2x2 patches: FLUX.2's pipelines lay out the tokens themselves.
        picture = noise.mT.reshape(len(texts), noise.shape[2], latent_height // 2, -1)
        return {"prompt": texts, "latents": picture}
    with _no_truncation_log():
        embeds, pooled, _ = pipe.encode_prompt(texts, None, max_sequence_length=tokens)
    return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "latents": noise}


def picture_path(out: str | Path) -> Path:
    """`out` with its suffix, its folder made: to be called before the work whose result goes there.

    Raises:
        GenerationError: another suffix than .png, a folder, or a place where nothing can be written.
    """
    path = Path(out)
    if path.suffix.lower() not in ("", ".png"):
        raise GenerationError(f"--out {path}: pictures are written as PNG; give a path ending in .png")
    path = path.with_suffix(".png")
    if path.is_dir():
        raise GenerationError(f"--out {path} is a folder; give a file name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GenerationError(f"--out {path}: no folder can be made there ({error.strerror})") from None
    if not os.access(path.parent, os.W_OK):
        raise GenerationError(f"--out {path}: no permission to write in {path.parent}; give another path")
    return path


def save_pictures(
    images: Sequence[Image.Image], out: str | Path, notes: Sequence[Mapping[str, str]] | None = None
) -> list[Path]:
    """Write PNG files, each appearing whole or not at all.

    Args:
        images: one becomes `out` itself; several become `out` with -0, -1, ... before the suffix.
        out: a path ending in .png, or without a suffix. Missing folders are made.
        notes: one mapping a picture, kept in the PNG's text fields (prompt, seed, model).

    Returns:
        The paths, in order.

    Raises:
        GenerationError: as `picture_path`.
        DiskFullError: no space left.
    """
    path = picture_path(out)
    paths = [path] if len(images) == 1 else [path.with_stem(f"{path.stem}-{i}") for i in range(len(images))]
    for i, (image, target) in enumerate(zip(images, paths, strict=True)):
        text = PngInfo()
        for key, value in (notes[i] if notes else {}).items():
            text.add_itxt(key, value)
        buffer = io.BytesIO()
        image.save(buffer, "PNG", pnginfo=text)
        write_atomic(target, buffer.getvalue())
    return paths


def _check(texts: list[str], seeds: list[int], steps: int, guidance: float, tokens: int, batch_size: int) -> None:
    if not texts:
        raise GenerationError("no prompt was given")
    if len(seeds) != len(texts):
        raise GenerationError(f"{len(texts)} prompts need as many seeds or one, not {len(seeds)}")
    for seed in seeds:
        if not 0 <= seed < 2**63:
            raise GenerationError(f"seed {seed} is out of range; use 0 to 2**63 - 1")
    for name, value in (("steps", steps), ("batch size", batch_size)):
        if value < 1:
            raise GenerationError(f"{name} must be at least 1, not {value}")
    if not math.isfinite(guidance) or guidance < 0:
        raise GenerationError(f"guidance must be a number from 0 on, not {guidance}")
    if not 1 <= tokens <= MAX_TEXT_TOKENS:
        raise GenerationError(f"text tokens must be 1 to {MAX_TEXT_TOKENS}, not {tokens}")


def _warn_about(pipe: Any, texts: list[str], tokens: int) -> None:
    """One line a prompt that the model will not read as it was written."""
    last = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer  # FLUX.1's CLIP reads a summary alone
    tokenizer = getattr(last, "tokenizer", last)  # FLUX.2-dev has a processor around its own
    for text in dict.fromkeys(texts):
        shown = text if len(text) <= 40 else text[:37] + "..."
        if not text.strip():
            warnings.warn("the prompt is empty: the model draws whatever it likes", PromptWarning, stacklevel=3)
        with _no_truncation_log():
            count = len(tokenizer(text).input_ids)
        if count > tokens:
            message = f"the prompt '{shown}' has {count} text tokens; only the first {tokens} are read"
            warnings.warn(message, PromptWarning, stacklevel=3)


@contextmanager
def _no_progress_bar(pipe: Any) -> Iterator[None]:
    before = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(before or {}))


@contextmanager
def _no_truncation_log() -> Iterator[None]:
    """The libraries log every cut prompt, in full and once a tokenizer; `_warn_about` has said it in one line.

    CLIP's cut at 77 tokens is by design: its pooled state is a summary, and T5 reads the whole prompt.
    """
    names = ("diffusers.pipelines.flux.pipeline_flux", "transformers.tokenization_utils_base")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
