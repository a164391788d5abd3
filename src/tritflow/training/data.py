"""Pictures, latents and tokens of the built-in world, made on the device that trains on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from tritflow.scenes import SceneBatch, render, training_examples
from tritflow.training.models import SEQUENCE_LENGTH, build_tokenizers
from tritflow.training.tints import tint
from tritflow.training.words import InventedWords

# Examples that a worker makes at a time.
CHUNK = 4096


def vocabulary(captions: list[str]) -> list[str]:
    """All words of the captions, commas apart, sorted."""
    return sorted({w for c in captions for w in c.replace(",", " ").split()})


def training_words() -> list[str]:
    """Every word that training captions use, found in 20,000 of them."""
    captions = [c for c, _ in itertools.islice(training_examples(0), 20_000)]
    return vocabulary(captions)


@dataclass
class Examples:
    """Training captions as token ids [N, L] of both tokenizers (int16), and their scenes."""

    clip_ids: Tensor
    t5_ids: Tensor
    scenes: SceneBatch

    def __len__(self) -> int:
        return len(self.scenes)


@lru_cache(maxsize=1)
def word_tokenizers() -> tuple[Any, Any]:
    """Both tokenizers of the small FLUX, one token a word."""
    return build_tokenizers(training_words())


@lru_cache(maxsize=1)
def invented_words() -> InventedWords:
    """Invented words of both tokenizers, on the CPU."""
    return InventedWords(*word_tokenizers())


def example_chunk(task: tuple[int, int, int, float]) -> Examples:
    """`count` examples of chunk `number` of the stream `seed`, a share of them tinted; task is (seed, number, count,
    share). Tokens are made here, in the worker: the process that trains has better things to do."""
    torch.set_num_threads(1)
    seed, number, count, tinted = task
    stream = seed * 1_000_003 + number
    pairs = list(itertools.islice(training_examples(stream), count))
    clip_ids, t5_ids = tokenize([c for c, _ in pairs], *word_tokenizers())
    scenes = SceneBatch.from_scenes([s for _, s in pairs])
    if tinted > 0:
        scenes, clip_ids, t5_ids = tint(scenes, clip_ids, t5_ids, invented_words(), tinted, stream)
    return Examples(clip_ids.short(), t5_ids.short(), scenes)


def make_examples(count: int, seed: int, workers: int, tinted: float = 0.0) -> Examples:
    """`count` training examples, made by `workers` processes; independent of their number. `tinted`: see `tint`."""
    tasks = [(seed, i, min(CHUNK, count - i * CHUNK), tinted) for i in range(-(-count // CHUNK))]
    with ExitStack() as stack:
        results: Iterable[Examples]
        if workers <= 1:
            results = map(example_chunk, tasks)
        else:
            pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
            results = pool.map(example_chunk, tasks)
        parts = list(results)
    return Examples(
        torch.cat([p.clip_ids for p in parts]),
        torch.cat([p.t5_ids for p in parts]),
        SceneBatch(
            torch.cat([p.scenes.kind for p in parts]),
            torch.cat([p.scenes.place for p in parts]),
            torch.cat([p.scenes.ground for p in parts]),
            torch.cat([p.scenes.turn for p in parts if p.scenes.turn is not None]) if tinted > 0 else None,
        ),
    )


@torch.no_grad()
def render_all(scenes: SceneBatch, size: int, device: torch.device, batch: int = 256) -> Tensor:
    """All scenes as uint8 pictures [N, 3, size, size] on the device."""
    out = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8, device=device)
    for i in range(0, len(scenes), batch):
        part = render(scenes[slice(i, i + batch)].to(device), size)
        out[i : i + batch] = (part * 255).round_().to(torch.uint8)
    return out


def pack(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H/2 * W/2, 4C], as FluxPipeline packs them."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h // 2 * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`, for latents of `height` x `width`."""
    b, _, c = tokens.shape
    x = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(b, c // 4, height, width)


def tokenize(captions: list[str], clip_tokenizer: Any, t5_tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Token ids [N, L] of both tokenizers, padded as FluxPipeline pads them."""
    clip = clip_tokenizer(
        captions,
        padding="max_length",
        max_length=clip_tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    t5 = t5_tokenizer(captions, padding="max_length", max_length=SEQUENCE_LENGTH, truncation=True, return_tensors="pt")
    return clip.input_ids, t5.input_ids


_EXAMPLES = ("latents", "clip_ids", "t5_ids", "kind", "place", "ground")


@dataclass
class LatentSet:
    """Training data of the transformer: packed, normalised latents [N, T, C] (bf16), token ids [N, L] and what the
    scenes hold (`scenes.SceneBatch`: kind int8 [N, S, 3], place [N, S, 3], ground [N])."""

    latents: Tensor
    clip_ids: Tensor
    t5_ids: Tensor
    kind: Tensor
    place: Tensor
    ground: Tensor
    empty_clip: Tensor
    empty_t5: Tensor

    def first(self, count: int) -> LatentSet:
        """The first `count` examples."""
        own = {name: getattr(self, name)[:count] for name in _EXAMPLES}
        return LatentSet(**own, empty_clip=self.empty_clip, empty_t5=self.empty_t5)

    def replace(self, begin: int, other: LatentSet) -> int:
        """Overwrite examples from `begin` on, in place (a captured graph sees the new ones), going on at the front
        when the end is reached. Returns where to go on."""
        rows = (begin + torch.arange(len(other.latents), device=self.latents.device)) % len(self.latents)
        for name in _EXAMPLES:
            getattr(self, name)[rows] = getattr(other, name)
        return (begin + len(other.latents)) % len(self.latents)


@torch.no_grad()
def encode_set(examples: Examples, vae: Any, size: int, device: torch.device, batch: int = 256) -> LatentSet:
    """Render and encode every scene; latents are shifted and scaled as FluxPipeline undoes it."""
    parts = []
    scenes = examples.scenes
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    for i in range(0, len(scenes), batch):
        image = render(scenes[slice(i, i + batch)].to(device), size) * 2 - 1
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            mean = vae.encode(image).latent_dist.mean
        parts.append(pack((mean.float() - shift) * scale).to(torch.bfloat16))
    empty_clip, empty_t5 = tokenize([""], *word_tokenizers())
    return LatentSet(
        torch.cat(parts),
        examples.clip_ids.to(device).long(),
        examples.t5_ids.to(device).long(),
        scenes.kind.to(device, torch.int8),
        scenes.place.to(device),
        scenes.ground.to(device),
        empty_clip.to(device),
        empty_t5.to(device),
    )
