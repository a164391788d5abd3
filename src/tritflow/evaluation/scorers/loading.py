"""Pictures for scorers: decoded and checked by threads while the model works on the batch before."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tritflow.evaluation.images import ImageSet
from tritflow.formats.environment import usable_cores

Pixels = NDArray[np.uint8]
Entry = dict[str, Any]

# A thread decodes some forty pictures of 1024x1024 a second (zlib and PIL let others run meanwhile).
WORKERS = max(2, min(16, usable_cores()))
AHEAD = 3
"""Batches that are read before they are asked for."""


def batches(
    images: ImageSet,
    entries: Sequence[Entry],
    size: int,
    skip: Callable[[list[Entry]], bool] = lambda group: False,
) -> Iterator[tuple[list[Entry], list[Pixels]]]:
    """`entries` in groups of at most `size` pictures of one shape each, with their uint8 [H, W, 3] pixels.

    Groups for which `skip` is true are left out; the others stay as they would be without it.

    Raises `ImageSetError` when it comes to a picture that is missing or damaged.
    """
    groups = [group for group in _groups(entries, size) if not skip(group)]
    with ThreadPoolExecutor(WORKERS) as pool:
        waiting: deque[tuple[list[Entry], list[Future[Pixels]]]] = deque()
        try:
            for group in groups:
                waiting.append((group, [pool.submit(ImageSet.pixels_of, images.folder, e) for e in group]))
                if len(waiting) > AHEAD:
                    yield _ready(waiting.popleft())
            while waiting:
                yield _ready(waiting.popleft())
        finally:
            for _, futures in waiting:
                for future in futures:
                    future.cancel()


def _groups(entries: Sequence[Entry], size: int) -> Iterator[list[Entry]]:
    group: list[Entry] = []
    for e in entries:
        if group and (len(group) == size or (e["height"], e["width"]) != (group[0]["height"], group[0]["width"])):
            yield group
            group = []
        group.append(e)
    if group:
        yield group


def _ready(item: tuple[list[Entry], list[Future[Pixels]]]) -> tuple[list[Entry], list[Pixels]]:
    return item[0], [f.result() for f in item[1]]


def to_tensor(pictures: Sequence[Pixels], device: str) -> torch.Tensor:
    """float32 [B, 3, H, W] in 0..255 on `device`, from uint8 [H, W, 3] of one shape."""
    stacked = torch.from_numpy(np.stack(pictures))
    return stacked.to(device).permute(0, 3, 1, 2).float()


CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """(pixels / 255 - mean) / std, per channel, of float [B, 3, H, W] in 0..255."""
    m, s = (torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (mean, std))
    return (pixels / 255 - m) / s


def resize(pixels: torch.Tensor, height: int, width: int, mode: str = "bilinear") -> torch.Tensor:
    """Resized with anti-aliasing, as PIL does, and rounded to whole levels in 0..255 as its bytes are."""
    if pixels.shape[-2:] == (height, width):
        return pixels
    out = torch.nn.functional.interpolate(pixels, (height, width), mode=mode, antialias=True, align_corners=False)
    return out.round().clamp(0, 255)
