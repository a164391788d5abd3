"""Read a picture back into objects: deterministic, no learned part, about a millisecond a picture.

The ground is neutral and every colour of the world is saturated, so chroma separates objects from the ground, hue
names the colour, the silhouette names the shape and the brightness inside it names the texture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from tritflow.scenes.render import shape_distances
from tritflow.scenes.world import COLORS, RGB, SHAPES

# Chroma (max - min channel) above which a pixel belongs to an object; the darkest tone of a texture has .29.
CHROMA = 0.17
# Pixels of an object as a share of the picture; the smallest drawn cover .01, specks of a bad picture less.
MIN_AREA = 0.0032
GRID = 32


@dataclass(frozen=True)
class Detection:
    """One object as seen: names, box (x0, y0, x1, y1) in pixels, how well the silhouette fits (IoU), and which
    share of the ground that it contests with other objects it won: 1 in front, 0 behind."""

    shape: str
    color: str
    texture: str
    box: tuple[float, float, float, float]
    score: float
    won: float = 1.0


def _as_float(image: Image.Image | np.ndarray) -> np.ndarray:
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise ValueError(f"expected a uint8 picture of shape [H, W, 3], got {array.dtype} {array.shape}")
    return array.astype(np.float32) / 255


def _chroma(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(-1) - pixels.min(-1)


def object_mask(image: Image.Image | np.ndarray) -> np.ndarray:
    """Which pixels belong to objects: bool [H, W]."""
    return _chroma(_as_float(image)) > CHROMA


@lru_cache(maxsize=1)
def _hues() -> np.ndarray:
    return _hue(np.array([RGB[c] for c in COLORS], dtype=np.float32)[None])[0]


def _hue(pixels: np.ndarray) -> np.ndarray:
    """Hue in turns, 0..1, of pixels [..., 3]."""
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return np.arctan2(np.sqrt(3) * (g - b), 2 * r - g - b) / (2 * np.pi) % 1


@lru_cache(maxsize=1)
def _templates() -> np.ndarray:
    """Silhouettes of all shapes, each stretched to its own box: bool [len(SHAPES), GRID, GRID]."""
    fine = (torch.arange(512) + 0.5) / 512 * 2.4 - 1.2
    inside = shape_distances(fine[None, :].expand(512, 512), fine[:, None].expand(512, 512)) < 0
    return np.stack([_to_grid(inside[..., i].numpy()) for i in range(len(SHAPES))])


def _to_grid(mask: np.ndarray) -> np.ndarray:
    """Crop a mask to its box and sample it on GRID x GRID points."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    ys = (y0 + (np.arange(GRID) + 0.5) / GRID * (y1 - y0)).astype(int)
    xs = (x0 + (np.arange(GRID) + 0.5) / GRID * (x1 - x0)).astype(int)
    return mask[np.ix_(ys, xs)]


@lru_cache(maxsize=64)
def _disc(size: int, radius_tenths: int) -> np.ndarray:
    """All shapes at one radius (in tenths of a pixel), centred in a size x size window: bool [S, size, size]."""
    axis = (torch.arange(size) + 0.5 - size / 2) / (radius_tenths / 10)
    return (
        (shape_distances(axis[None, :].expand(size, size), axis[:, None].expand(size, size)) < 0)
        .permute(2, 0, 1)
        .numpy()
    )


def detect(image: Image.Image | np.ndarray) -> list[Detection]:
    """All objects of a picture (PIL or uint8 [H, W, 3]), the largest first.

    Raises:
        ValueError: not a uint8 RGB picture.
    """
    pixels = _as_float(image)
    side = max(pixels.shape[:2])
    mask = _chroma(pixels) > CHROMA
    if not mask.any():
        return []
    offset = np.abs(_hue(pixels[mask])[:, None] - _hues())
    color = np.zeros(mask.shape, dtype=np.int64)
    color[mask] = np.minimum(offset, 1 - offset).argmin(-1)
    minimum = MIN_AREA * mask.size
    parts: list[tuple[np.ndarray, int, bool]] = []
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    for window, index in zip(ndimage.find_objects(labels), range(1, count + 1), strict=True):
        blob = labels[window] == index
        if blob.sum() < minimum:
            continue
        split = _split(blob, color[window], minimum)
        parts += [(_place(part, window, mask.shape), c, len(split) > 1) for part, c in split]
    fits = [_fit(part, mask & ~part) if covered else _match(part) for part, _, covered in parts]
    found = []
    for i, ((part, c, _), fit) in enumerate(zip(parts, fits, strict=True)):
        won = 1.0
        if fit.drawn is not None:
            rivals = [f.drawn for j, f in enumerate(fits) if j != i and f.drawn is not None]
            contested = fit.drawn & np.any(rivals, axis=0) if rivals else np.zeros_like(part)
            if contested.sum() >= 4:
                won = float((part & contested).sum() / contested.sum())
        texture = _texture(pixels, part, side)
        found.append(Detection(SHAPES[fit.shape], COLORS[c], texture, fit.box, round(fit.score, 4), round(won, 4)))
    return sorted(found, key=lambda d: -(d.box[2] - d.box[0]) * (d.box[3] - d.box[1]))


def _place(part: np.ndarray, window: tuple[slice, slice], shape: tuple[int, int]) -> np.ndarray:
    full = np.zeros(shape, dtype=bool)
    full[window] = part
    return full


def _split(blob: np.ndarray, color: np.ndarray, minimum: float) -> list[tuple[np.ndarray, int]]:
    """Parts of one connected blob by colour: objects that touch or cover each other."""
    counts = np.bincount(color[blob], minlength=len(COLORS))
    parts = []
    for c in np.flatnonzero(counts >= max(minimum, 0.04 * blob.sum())):
        own = blob & (color == c)
        # Opening removes the thin rims of mixed hue between neighbours.
        core, n = ndimage.label(ndimage.binary_opening(own, structure=np.ones((3, 3))), structure=np.ones((3, 3)))
        if n == 0:
            continue
        sizes = np.bincount(core.ravel())[1:]
        keep = np.isin(core, 1 + np.flatnonzero(sizes >= 0.15 * sizes.max()))
        if keep.sum() >= minimum:
            parts.append((ndimage.binary_dilation(keep, structure=np.ones((3, 3))) & own, int(c)))
    if len(parts) <= 1:
        return [(blob, int(counts.argmax()))]
    return parts


@dataclass(frozen=True)
class _Fit:
    """The best shape for a silhouette; `drawn` is the whole shape, hidden pixels too, where some may be hidden."""

    shape: int
    score: float
    box: tuple[float, float, float, float]
    drawn: np.ndarray | None = None


def _match(part: np.ndarray) -> _Fit:
    """Best shape of a whole silhouette: IoU with every template in its own box, less for a wrong aspect."""
    rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    box = (float(cols[0]), float(rows[0]), float(cols[-1] + 1), float(rows[-1] + 1))
    grid = _to_grid(part)
    templates = _templates()
    iou = (grid & templates).sum((1, 2)) / (grid | templates).sum((1, 2))
    best = int(iou.argmax())
    return _Fit(best, float(iou[best]), box)


def _fit(part: np.ndarray, unknown: np.ndarray) -> _Fit:
    """Best shape, size and place of a silhouette of which other objects may hide some: pixels of `unknown` count
    neither for nor against."""
    rows, cols = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    y0, y1, x0, x1 = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
    height, width = y1 - y0, x1 - x0
    low = max(height, width) / 2
    best = _Fit(0, -1.0, (float(x0), float(y0), float(x1), float(y1)), part)
    window = int(2 * np.ceil(low * 1.8) + 8)
    half = window // 2
    padded, hidden = np.pad(part, window), np.pad(unknown, window)
    for scale in np.arange(0.88, 1.45, 0.04):
        radius = float(low * scale)
        shapes = _disc(window, round(radius * 10))
        centres = {
            (round(cx), round(cy))
            for cx in (x0 + radius, (x0 + x1) / 2, x1 - radius)
            for cy in (y0 + radius, (y0 + y1) / 2, y1 - radius)
        }
        for cx, cy in sorted(centres):
            top, left = cy + window - half, cx + window - half
            here = (slice(top, top + window), slice(left, left + window))
            seen = padded[here]
            if seen.shape != (window, window):
                continue
            drawn = shapes & ~hidden[here]
            iou = (drawn & seen).sum((1, 2)) / np.maximum((drawn | seen).sum((1, 2)), 1)
            # Slightly prefer the smaller explanation: hidden area is a guess.
            iou = iou - 0.02 * max(0.0, scale - 1)
            s = int(iou.argmax())
            if iou[s] > best.score:
                whole = np.zeros_like(padded)
                whole[here] = shapes[s]
                box = (cx - radius, cy - radius, cx + radius, cy + radius)
                best = _Fit(s, float(iou[s]), box, whole[window:-window, window:-window])
    return best


def _texture(pixels: np.ndarray, part: np.ndarray, side: int) -> str:
    """Solid, striped (bands across y) or checkered, from the brightness inside the silhouette."""
    margin = max(1, side // 64)
    core = ndimage.binary_erosion(part, iterations=margin)
    if core.sum() < 24:
        core = part
    value = pixels.max(-1)
    inside = value[core]
    if inside.std() < 0.1 * max(inside.mean(), 1e-3) + 0.02:
        return "solid"
    rows = np.flatnonzero(core.any(1))
    weight = core[rows].sum(1)
    mean = (value * core)[rows].sum(1) / np.maximum(weight, 1)
    explained = (weight * (mean - inside.mean()) ** 2).sum() / weight.sum()
    return "striped" if explained > 0.4 * inside.var() else "checkered"
