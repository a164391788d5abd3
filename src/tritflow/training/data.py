"""Pictures, latents and tokens of the built-in world, made on the device that trains on them."""

from __future__ import annotations

import itertools
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from tritflow.scenes import SceneBatch, render, training_examples
from tritflow.scenes.grammar import WORDS
from tritflow.training.blends import blend, named
from tritflow.training.models import SEQUENCE_LENGTH, build_tokenizers
from tritflow.training.tints import tint
from tritflow.training.words import InventedWords

# Examples that a worker makes at a time.
CHUNK = 4096


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
    return build_tokenizers(list(WORDS))


@lru_cache(maxsize=1)
def invented_words() -> InventedWords:
    """Invented words of both tokenizers, on the CPU."""
    return InventedWords(*word_tokenizers())


@dataclass(frozen=True)
class Mixture:
    """What a stream of examples holds beside named shapes in named colours.

    Args:
        tinted: share of scenes in hues that no word names (`tints`).
        blended: share of scenes in shapes that no word names (`blends`).
        overlapping: share of scenes in which one object is in front of another, beyond those of the plain stream.
        counting: share of the blended scenes whose captions do nothing but count.
    """

    tinted: float = 0.0
    blended: float = 0.0
    overlapping: float = 0.0
    counting: float = 0.25


def example_chunk(task: tuple[int, int, int, Mixture]) -> Examples:
    """`count` examples of chunk `number` of the stream `seed`; task is (seed, number, count, mixture). Tokens are made
    here, in the worker: the process that trains has better things to do."""
    torch.set_num_threads(1)
    seed, number, count, mixture = task
    stream = seed * 1_000_003 + number
    front, counts = round(count * mixture.overlapping), round(count * mixture.blended * mixture.counting)
    counts = min(counts, count - front)
    plain = count - front - counts
    # The rest of what is to be blended; scenes in front of each other are not.
    share = min(1.0, (mixture.blended * count - counts) / max(plain, 1))
    drawn = (training_examples(stream), training_examples(stream, ("count",)), training_examples(stream, ("front",)))
    parts: list[tuple[SceneBatch, Tensor, Tensor]] = []
    for stories, many, blended in zip(drawn, (plain, counts, front), (share, 1.0, 0.0), strict=True):
        pairs = list(itertools.islice(stories, many))
        if not pairs:
            continue
        part = SceneBatch.from_scenes([s for _, s in pairs]), *tokenize([c for c, _ in pairs], *word_tokenizers())
        parts.append(blend(*part, invented_words(), blended, stream) if mixture.blended > 0 else part)
    scenes = SceneBatch.join([p[0] for p in parts])
    clip_ids, t5_ids = torch.cat([clip for _, clip, _ in parts]), torch.cat([t5 for _, _, t5 in parts])
    if mixture.tinted > 0:
        scenes, clip_ids, t5_ids = tint(scenes, clip_ids, t5_ids, invented_words(), mixture.tinted, stream)
    if len(parts) > 1:  # whoever takes the first ones takes some of all
        order = torch.randperm(count, generator=torch.Generator().manual_seed(number))
        scenes, clip_ids, t5_ids = scenes[order], clip_ids[order], t5_ids[order]
    return Examples(clip_ids.short(), t5_ids.short(), scenes)


class Order:
    """`count` training examples that a pool's workers make while other things are done; independent of their number."""

    def __init__(self, pool: Executor, count: int, seed: int, mixture: Mixture | None = None) -> None:
        self.count = count
        tasks = [(seed, i, min(CHUNK, count - i * CHUNK), mixture or Mixture()) for i in range(-(-count // CHUNK))]
        self.parts = [pool.submit(example_chunk, task) for task in tasks]

    def first(self, count: int) -> Examples:
        """The first `count`, or more: whole chunks."""
        return join([p.result() for p in self.parts[: -(-count // CHUNK)]])

    def all(self) -> Examples:
        """All of them, once they are there."""
        return self.first(self.count)


def join(parts: list[Examples]) -> Examples:
    """All examples of `parts`, in order."""
    return Examples(
        torch.cat([p.clip_ids for p in parts]),
        torch.cat([p.t5_ids for p in parts]),
        SceneBatch.join([p.scenes for p in parts]),
    )


def make_examples(count: int, seed: int, workers: int, mixture: Mixture | None = None) -> Examples:
    """`count` training examples, made by `workers` processes; independent of their number."""
    if workers > 1:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            return Order(pool, count, seed, mixture).all()
    chunks = range(-(-count // CHUNK))
    return join([example_chunk((seed, i, min(CHUNK, count - i * CHUNK), mixture or Mixture())) for i in chunks])


def at_a_time(size: int, batch: int = 256) -> int:
    """How many pictures of `size` to draw at a time: as many pixels as `batch` pictures of 128 have."""
    return max(1, batch * 128 * 128 // (size * size)) if size > 128 else batch


@torch.no_grad()
def render_all(scenes: SceneBatch, size: int, device: torch.device, batch: int = 256) -> Tensor:
    """All scenes as uint8 pictures [N, 3, size, size] on the device."""
    out = torch.empty(len(scenes), 3, size, size, dtype=torch.uint8, device=device)
    batch = at_a_time(size, batch)
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
    scenes hold (`scenes.SceneBatch`: kind int8 [N, S, 3], shapes by what names them (`blends.named`), place [N, S, 3],
    ground [N])."""

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
    scenes, batch = examples.scenes, at_a_time(size, batch)
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
        named(scenes).to(device, torch.int8),
        scenes.place.to(device),
        scenes.ground.to(device),
        empty_clip.to(device),
        empty_t5.to(device),
    )
