"""What the detector cannot see: marks on the ground of a picture, how far the tones of a texture lie apart, and what a
round trip leaves of each colour, texture and ground, in dB."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import islice, product

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from tritflow.scenes.detector import INNER, inner, object_mask
from tritflow.scenes.render import SceneBatch, render
from tritflow.scenes.training_set import training_examples
from tritflow.scenes.world import BACKGROUNDS, COLORS, GRAY_LEVEL, TEXTURES

# Chroma of a pixel that an object colours at least in part.
_CHROMA = 0.1
# Pixels around an object that are not looked at for marks, as a share of the picture's side; how far a mark's pixels
# are off the ground's median, of 255.
_AROUND, _MARK = 5 / 128, 5
# Quantiles of a texture's brightness that stand for its tones, each of which covers half of it.
_TONES = (0.1, 0.9)
# A picture has ghosts if more than this share of its ground is marked.
GHOSTS = 0.0025


def weakest(
    round_trip: Callable[[Tensor], Tensor], size: int = 128, pictures: int = 12, seed: int = 7
) -> list[tuple[float, str]]:
    """Every colour, texture and ground with the PSNR of its objects' pixels after a round trip, worst first.

    A detector reads slanted stripes as checkers, if nothing else is like them; pixels tell.

    Args:
        round_trip: pixels float [B, 3, H, W] in 0..1 to pixels of the same shape.
        size: height and width in pixels.
        pictures: training scenes that each combination is put on, all objects alike.
        seed: of the scenes.

    Returns:
        [(dB, "green checkered black"), ...]; the pixels around an object's coloured ones count, too, since the other
        half of a checker has no colour.
    """
    drawn = SceneBatch.from_scenes([s for _, s in islice(training_examples(seed), pictures)])
    found = []
    for color, texture, ground in product(COLORS, TEXTURES, BACKGROUNDS):
        kind = drawn.kind.clone()
        there = kind[..., 0] >= 0
        kind[..., 1] = torch.where(there, COLORS.index(color), kind[..., 1])
        kind[..., 2] = torch.where(there, TEXTURES.index(texture), kind[..., 2])
        images = render(replace(drawn, kind=kind, ground=torch.full_like(drawn.ground, GRAY_LEVEL[ground])), size)
        chroma = images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
        near = F.max_pool2d((chroma > _CHROMA).float(), 3, 1, 1)
        error = ((round_trip(images).float().cpu() - images).square() * near).sum() / (3 * near.sum())
        found.append((round(float(-10 * error.clamp_min(1e-10).log10()), 2), f"{color} {texture} {ground}"))
    return sorted(found)


def marked(image: np.ndarray) -> float:
    """The share of a picture's ground that does not look like the rest of it: ghosts of objects, stains, noise.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        0..1, of the pixels that lie 5/128 of the side or more away from every object; 0 where there are none.
    """
    around = max(1, round(_AROUND * max(image.shape[:2])))
    ground = ~ndimage.binary_dilation(object_mask(image), iterations=around)
    if not ground.any():
        return 0.0
    pixels = image[ground].astype(np.float32)
    return float((np.abs(pixels - np.median(pixels, 0)).max(-1) > _MARK).mean())


def texture_contrast(image: np.ndarray) -> float | None:
    """How far the bright and the dark tone of a picture's objects lie apart, (bright - dark) / (bright + dark).

    Michelson's contrast of the largest channel, a pixel or more inside the objects; of pictures of striped or checkered
    objects alone it says something. The renderer draws .41, an even colour has 0.

    Args:
        image: uint8 [H, W, 3].

    Returns:
        0..1; None where there is no object.
    """
    inside = inner(object_mask(image))
    if inside.sum() < INNER:
        return None
    dark, bright = np.quantile(image[inside].max(-1).astype(np.float64), _TONES)
    return float((bright - dark) / max(bright + dark, 1.0))
