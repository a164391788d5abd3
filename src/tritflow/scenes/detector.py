"""Read a picture back into objects: deterministic, no learned part.

At 128 x 128 on one CPU core: about a millisecond a picture, 5 where objects overlap, under 30 for coloured noise.

The ground is neutral and every colour of the world is saturated, so chroma separates objects from the ground, hue
names the colour, the silhouette names the shape and the brightness inside it names the texture.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image
from scipy import ndimage

from tritflow.scenes.silhouettes import Fit, Search, fit, match
from tritflow.scenes.world import COLORS, RGB, SHAPES

# Chroma (max - min channel) above which a pixel belongs to an object; the darkest tone of a texture has .29.
CHROMA = 0.17
# Pixels of an object as a share of the picture; the smallest drawn cover .01, specks of a bad picture less.
MIN_AREA = 0.0032
# Brightness that varies by less of its mean is solid: full patterns vary by a third, solid objects as the small FLUX
# draws them by less than .006, checkers that its VAE washed out by .04 to .2.
PATTERN = 0.05
# The world draws at most 4 objects; a picture of more parts is junk, and only its largest parts are read.
MAX_PARTS = 8
# Silhouettes are searched for at most so often a picture; further ones are read as if whole.
MAX_FITS = 4
# Whole silhouettes that fit the shapes in their box worse than this are searched for as well.
POOR = 0.8
# Two whole shapes that overlap by this share are one object; true ones in front of each other reach half of it.
SAME = 0.6
# A decoder mixes hues of neighbours within a patch of its latents, 8 pixels a side. A colour of which this share lies
# so near to two others is no object's.
MIXING, MIXED = 8, 0.65
# Two objects and what lies between their hues; more colours in one blob are no mixture but junk.
MAX_MIXED = 4
# Pieces of a part smaller than this share of its largest are left out: rims, but not what a ring's hole shows.
KEEP = 0.03
# Fewer pixels than these, away from an object's edge, say nothing of its texture.
INNER = 24
_EIGHT = np.ones((3, 3), dtype=bool)


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
    r, g, b = pixels[..., 0], pixels[..., 1], pixels[..., 2]
    return np.maximum(np.maximum(r, g), b) - np.minimum(np.minimum(r, g), b)


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


def detect(image: Image.Image | np.ndarray) -> list[Detection]:
    """All objects of a picture (PIL or uint8 [H, W, 3]), the largest first; of a picture full of specks, the largest
    `MAX_PARTS` alone.

    Raises:
        ValueError: not a uint8 RGB picture.
    """
    pixels = _as_float(image)
    mask = _chroma(pixels) > CHROMA
    if not mask.any():
        return []
    hue = _hue(pixels)
    parts = _parts(mask, hue)
    covered = [i for i, p in enumerate(parts) if p.covered][:MAX_FITS]
    searches = {i: Search(parts[i].mask, mask & ~parts[i].mask) for i in covered}
    chosen = _agreed({i: parts[i].mask for i in covered}, {i: s.fits for i, s in searches.items()})
    fits = [searches[i].settle(chosen[i]) if i in covered else match(p.mask) for i, p in enumerate(parts)]
    # A dim or blurred rim moves a small object's box by a pixel, which costs a star a third of its fit.
    poor = [i for i, f in enumerate(fits) if i not in covered and f.score < POOR][: MAX_FITS - len(covered)]
    for i in poor:
        better = replace(fit(parts[i].mask, np.zeros_like(mask)), drawn=None)
        # A search makes something of anything, so that it has to find much more than an object's least fit.
        fits[i] = better if better.score >= POOR else fits[i]
    parts, fits = _without_rims(parts, fits)
    value = np.maximum(np.maximum(pixels[..., 0], pixels[..., 1]), pixels[..., 2])
    claims = np.zeros(mask.shape, dtype=np.int64)
    for best in fits:
        if best.drawn is not None:
            claims += best.drawn
    found = []
    for part, best in zip(parts, fits, strict=True):
        won = 1.0
        if best.drawn is not None:
            contested = best.drawn & (claims > 1)
            if contested.sum() >= 4:
                won = float((part.mask & contested).sum() / contested.sum())
        texture = _texture(value, part.mask)
        names = SHAPES[best.shape], COLORS[part.color], texture
        found.append(Detection(*names, best.box, round(best.score, 4), round(won, 4)))
    return sorted(found, key=lambda d: -(d.box[2] - d.box[0]) * (d.box[3] - d.box[1]))


@dataclass(frozen=True)
class _Part:
    """Pixels of one object: bool [H, W], the colour's number, and whether other objects may hide some of it."""

    mask: np.ndarray
    color: int
    covered: bool


def _nearest(hue: np.ndarray, among: np.ndarray) -> np.ndarray:
    """The colour's number out of `among` whose hue is nearest."""
    offset = np.abs(hue[..., None] - _hues()[among])
    return among[np.minimum(offset, 1 - offset).argmin(-1)]


@lru_cache(maxsize=1)
def _between() -> np.ndarray:
    """Whether a mix of colours a and b looks like colour c: bool [a, b, c]; c's hue lies on the shorter way."""
    h = _hues()
    ahead = (h[None, :] - h[:, None]) % 1
    way = ahead[:, :, None] > ahead[:, None, :]
    forward = way & (ahead[:, None, :] > 0) & (ahead[:, :, None] <= 0.5)
    return forward | forward.transpose(1, 0, 2)


def _parts(mask: np.ndarray, hue: np.ndarray) -> list[_Part]:
    """The objects' pixels, the largest objects first, `MAX_PARTS` at most."""
    minimum = MIN_AREA * mask.size
    color = np.zeros(mask.shape, dtype=np.int64)
    color[mask] = _nearest(hue[mask], np.arange(len(COLORS)))
    labels, _ = ndimage.label(mask, structure=_EIGHT)
    sizes = np.bincount(labels.ravel())[1:]
    large = [int(i) for i in np.argsort(-sizes, kind="stable")[:MAX_PARTS] if sizes[i] >= minimum]
    windows = ndimage.find_objects(labels)
    parts: list[_Part] = []
    for i in large:
        split = _split(labels[windows[i]] == i + 1, color[windows[i]], hue[windows[i]], minimum)
        for part, c in split:
            full = np.zeros(mask.shape, dtype=bool)
            full[windows[i]] = part
            parts.append(_Part(full, c, len(split) > 1))
    parts = sorted(parts, key=lambda p: -int(p.mask.sum()))[:MAX_PARTS]
    # Opposite hues mix to grey, so that objects in touch may be blobs of their own, a pixel or two apart.
    claimed = np.sum([_grown(p.mask) for p in parts], axis=0) if len(parts) > 1 else np.zeros(mask.shape)
    return [replace(p, covered=p.covered or bool((claimed[_grown(p.mask)] > 1).any())) for p in parts]


def _agreed(masks: dict[int, np.ndarray], fits: dict[int, list[Fit]]) -> dict[int, int]:
    """Which of each part's possible shapes to take: pair by pair those that, one in front of the other, show most
    nearly what is seen. A ring in front is no disc whose middle is hidden, since what hides it lies behind."""
    chosen: dict[int, int] = {}
    for i, j in itertools.combinations(masks, 2):
        first, second = _drawn(fits[i][0]), _drawn(fits[j][0])
        if not (first & second).any():
            continue
        options = [[chosen[k]] if k in chosen else range(len(fits[k])) for k in (i, j)]
        best = -1.0
        for m, n in itertools.product(*options):
            x, y = _drawn(fits[i][m]), _drawn(fits[j][n])
            # Each alone explains its own part well enough; what both show together says more.
            value = _shown(masks[i], masks[j], x, y) + (fits[i][m].score + fits[j][n].score) / 4
            if value > best:
                best, chosen[i], chosen[j] = value, m, n
    return {i: chosen.get(i, 0) for i in masks}


def _drawn(fit: Fit) -> np.ndarray:
    """The whole shape of a part that was searched for."""
    assert fit.drawn is not None
    return fit.drawn


def _shown(a: np.ndarray, b: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """How nearly shapes `x` and `y`, the better of them in front, show parts `a` and `b`: the share of all pixels."""
    both = x & y
    right = np.count_nonzero(a & x & ~both) + np.count_nonzero(b & y & ~both)
    right += max(np.count_nonzero(a & both), np.count_nonzero(b & both))
    return right / np.count_nonzero(a | b | x | y)


def _without_rims(parts: list[_Part], fits: list[Fit]) -> tuple[list[_Part], list[Fit]]:
    """Give a part whose whole shape coincides with a larger part's to that one: a rim or stripe of mixed hue, as
    decoders leave them, is no object of its own."""
    kept: list[int] = []
    masks = [p.mask for p in parts]
    for i, best in enumerate(fits):
        for j in kept:
            other = fits[j].drawn
            if best.drawn is None or other is None:
                continue
            if (best.drawn & other).sum() > SAME * (best.drawn | other).sum():
                masks[j] = masks[j] | masks[i]
                break
        else:
            kept.append(i)
    return [replace(parts[i], mask=masks[i]) for i in kept], [fits[i] for i in kept]


def _pure(blob: np.ndarray, color: np.ndarray, large: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Those of a blob's `large` colours that are no mix of two others where these meet."""
    near = {int(c): ndimage.maximum_filter((blob & (color == c)).view(np.uint8), 2 * MIXING + 1) > 0 for c in large}
    left = [int(c) for c in large]
    for c in sorted(left, key=lambda c: counts[c]):
        own = blob & (color == c)
        others = [o for o in left if o != c]
        for a, b in itertools.combinations(others, 2):
            if _between()[a, b, c] and (own & near[a] & near[b]).sum() > MIXED * counts[c]:
                left.remove(c)
                break
    return np.array(left)


def _split(blob: np.ndarray, color: np.ndarray, hue: np.ndarray, minimum: float) -> list[tuple[np.ndarray, int]]:
    """Parts of one connected blob by colour: objects that touch or cover each other."""
    counts = np.bincount(color[blob], minlength=len(COLORS))
    large = np.flatnonzero(counts >= max(minimum, 0.04 * blob.sum()))
    if 2 < len(large) <= MAX_MIXED:
        large = _pure(blob, color, large, counts)
    if len(large) > 1:
        color = _nearest(hue, large)
    parts = []
    for c in large if len(large) > 1 else ():
        own = blob & (color == c)
        # Opening removes the thin rims of mixed hue between neighbours.
        core, n = ndimage.label(_grown(_shrunk(own)), structure=_EIGHT)
        if n == 0:
            continue
        sizes = np.bincount(core.ravel())
        sizes[0] = 0
        keep = (sizes >= KEEP * sizes.max())[core] & (core > 0)
        if keep.sum() >= minimum:
            parts.append((_grown(keep) & own, int(c)))
    if len(parts) <= 1:
        return [(blob, int(counts.argmax()))]
    return parts


def _shrunk(mask: np.ndarray) -> np.ndarray:
    """Pixels whose eight neighbours are set too; the picture's rim is not."""
    out = np.zeros_like(mask)
    rows = mask[:-2] & mask[1:-1] & mask[2:]
    out[1:-1, 1:-1] = rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]
    return out


def inner(mask: np.ndarray) -> np.ndarray:
    """What of a mask is away from its edge, where colours mix: by a pixel, in larger pictures by more."""
    for _ in range(max(1, max(mask.shape) // 64)):
        mask = _shrunk(mask)
    return mask


def _grown(mask: np.ndarray) -> np.ndarray:
    """Set pixels and their eight neighbours."""
    return ~_shrunk(np.pad(~mask, 1, constant_values=True))[1:-1, 1:-1]


def _texture(value: np.ndarray, part: np.ndarray) -> str:
    """Solid, striped (bands across y) or checkered, from the brightness inside the silhouette."""
    core = inner(part)
    if core.sum() < INNER:
        core = part
    inside = value[core]
    if inside.std() < PATTERN * inside.mean():
        return "solid"
    rows = np.flatnonzero(core.any(1))
    weight = core[rows].sum(1)
    mean = (value * core)[rows].sum(1) / np.maximum(weight, 1)
    explained = (weight * (mean - inside.mean()) ** 2).sum() / weight.sum()
    return "striped" if explained > 0.4 * inside.var() else "checkered"
