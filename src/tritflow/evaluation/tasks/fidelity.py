"""How far a student's pictures lie from its teacher's pictures of the same noise.

Measured picture by picture, reported as medians with intervals over prompts:

- PSNR over the whole picture and over object pixels (where the teacher's picture shows an object), in dB.
- SSIM (Wang, Bovik, Sheikh, Simoncelli 2004, IEEE TIP 13, eq. 13) on luma.
- Per octave of spatial frequency: the ratio of the student's spectral energy to the teacher's (1 is right, less is
  blur, more is noise) and their coherence (1 is the same detail, 0 is unrelated detail).
- LPIPS (0 is the same), where its weights are at hand.
- Fine detail that either picture shows by itself (`detail`): the student's over the teacher's.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from tritflow.evaluation import statistics
from tritflow.evaluation.api import EvaluationError, Progress
from tritflow.evaluation.images import ImageSet
from tritflow.evaluation.workers import by_chunks, workers_of_environment

if TYPE_CHECKING:
    from tritflow.evaluation.scorers.lpips import Lpips
    from tritflow.evaluation.tasks.detail import Detail

# Below this many pixels starting worker processes costs more than it saves; pictures compared at a time.
POOL_FROM, _CHUNK = 10_000_000, 64

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float64]
Mask = Callable[[Pixels], NDArray[np.bool_]]

PSNR_CEILING = 100.0
"""dB written for identical pictures, whose PSNR is infinite."""

BANDS = ("lowest", "1/16", "1/8", "1/4", "top")
"""Octaves of radial frequency by their upper edge as a share of the Nyquist frequency; `top` is the highest octave
(half to all of Nyquist and the corners of the spectrum beyond it), `lowest` all below 1/16."""

_LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601


@dataclass(frozen=True)
class PictureFidelity:
    """One picture's distance from its teacher's. `psnr_object` is None where the teacher drew no object; a band's
    numbers are None where the teacher's band is empty. Bands in the order of `BANDS`. `details` by name: the picture's
    own and the teacher's, of those that both show."""

    prompt_id: str
    tag: str
    sample: int
    psnr: float
    psnr_object: float | None
    ssim: float
    energy: tuple[float | None, ...]
    coherence: tuple[float | None, ...]
    lpips: float | None = None
    details: dict[str, tuple[float, float]] = field(default_factory=dict)


def luma(pixels: Pixels) -> Floats:
    """[H, W] in 0..255 from uint8 [H, W, 3] (BT.601 weights)."""
    weighted: Floats = pixels.astype(np.float64) @ _LUMA
    return weighted


def psnr(picture: Pixels, reference: Pixels, mask: NDArray[np.bool_] | None = None) -> float | None:
    """10 log10(255^2 / MSE) in dB over all pixels or those of `mask` [H, W]; None when the mask is empty."""
    _check_shapes(picture, reference)
    difference = picture.astype(np.float64) - reference.astype(np.float64)
    if mask is not None:
        difference = difference[mask]
        if difference.size == 0:
            return None
    mse = float(np.mean(difference**2))
    return PSNR_CEILING if mse == 0 else min(PSNR_CEILING, 10 * math.log10(255.0**2 / mse))


def ssim(picture: Pixels, reference: Pixels) -> float:
    """Mean structural similarity of the lumas: 11x11 Gaussian window of sigma 1.5, K1 = .01, K2 = .03, L = 255, over
    windows that lie inside the picture (Wang et al. 2004, eq. 13 and section III.C)."""
    _check_shapes(picture, reference)
    x, y = luma(picture), luma(reference)
    if min(x.shape) < 11:
        raise EvaluationError(f"SSIM needs pictures of at least 11x11 pixels, got {x.shape[1]}x{x.shape[0]}")
    stack = np.stack([x, y, x * x, y * y, x * y])
    # radius 5 on both picture axes and none across the stack: the paper's 11-tap window
    means = gaussian_filter(stack, sigma=(0, 1.5, 1.5), radius=(0, 5, 5), mode="nearest")[:, 5:-5, 5:-5]
    mx, my, xx, yy, xy = means
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    top = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2)
    bottom = (mx**2 + my**2 + c1) * (xx - mx**2 + yy - my**2 + c2)
    return float(np.mean(top / bottom))


@lru_cache(maxsize=8)
def _spectrum_plan(height: int, width: int) -> tuple[Floats, NDArray[np.int64], Floats]:
    """Hann window [H, W], band of every coefficient of `rfft2` (-1 for the mean), and how often it counts."""
    window = np.outer(np.hanning(height + 2)[1:-1], np.hanning(width + 2)[1:-1])
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :]
    radius = np.hypot(fy, fx) / 0.5
    edges = np.array([1 / 16, 1 / 8, 1 / 4, 1 / 2])
    band = np.searchsorted(edges, radius, side="left").astype(np.int64)
    band[0, 0] = -1
    # rfft2 leaves out the mirror images of all columns but the first and, for even widths, the last.
    twice = np.full(radius.shape, 2.0)
    twice[:, 0] = 1
    if width % 2 == 0:
        twice[:, -1] = 1
    return window, band, twice


def bands(picture: Pixels, reference: Pixels) -> tuple[tuple[float | None, ...], tuple[float | None, ...]]:
    """(energy ratios, coherences) by octave of radial frequency, in the order of `BANDS`.

    With S and T the spectra of the lumas (mean removed, Hann window): ratio = sum |S|^2 / sum |T|^2, coherence =
    Re sum S conj(T) / sqrt(sum |S|^2 sum |T|^2), sums over the band.
    """
    _check_shapes(picture, reference)
    window, band, twice = _spectrum_plan(*picture.shape[:2])
    s, t = (np.fft.rfft2((y - y.mean()) * window) for y in (luma(picture), luma(reference)))
    inside = band >= 0
    index = band[inside]

    def total(values: Floats) -> Floats:
        summed: Floats = np.bincount(index, weights=(values * twice)[inside], minlength=len(BANDS))  # type: ignore[assignment]
        return summed

    ss, tt, st = total(np.abs(s) ** 2), total(np.abs(t) ** 2), total((s * np.conj(t)).real)
    # Below one grey level of RMS error over the band there is no detail to keep, only rounding.
    floor = 1e-6 * s.size * 255.0
    energy = tuple(float(a / b) if b > floor else None for a, b in zip(ss, tt, strict=True))
    coherence = tuple(
        (float(c / math.sqrt(a * b)) if a > floor else 0.0) if b > floor else None
        for a, b, c in zip(ss, tt, st, strict=True)
    )
    return energy, coherence


def measure(
    student: ImageSet,
    teacher: ImageSet,
    mask: Mask | None = None,
    progress: Progress | None = None,
    perceptual: Lpips | None = None,
    workers: int | None = None,
    details: Sequence[Detail] = (),
) -> list[PictureFidelity]:
    """Every picture of `student` against the teacher's of the same prompt and seed.

    `mask` finds object pixels in the teacher's picture (`scenes.object_mask` for the built-in suite; a function that
    other processes can import); without it `psnr_object` is None, and `lpips` is without `perceptual`. `details` are
    measured in both pictures (`Task.details`). Many pictures are compared by `workers` processes (default:
    `workers_of_environment`), the numbers do not depend on how many.
    Raises `ImageSetError` when the two sets do not match.
    """
    pairs = student.pairs(teacher)
    small = sum(mine["height"] * mine["width"] for mine, _ in pairs) < POOL_FROM
    compare = functools.partial(_compare_chunk, student.folder, teacher.folder, mask, tuple(details))
    found: list[PictureFidelity] = []
    for some in by_chunks(compare, pairs, _CHUNK, 1 if small else workers or workers_of_environment()):
        if perceptual is not None:  # a model: here, not once in every process
            some = [
                replace(one, lpips=_perceived(perceptual, student, teacher, *pair))
                for one, pair in zip(some, pairs[len(found) :], strict=False)
            ]
        found += some
        if progress is not None:
            progress(len(found), len(pairs))
    return found


def _perceived(
    perceptual: Lpips, student: ImageSet, teacher: ImageSet, mine: dict[str, Any], theirs: dict[str, Any]
) -> float:
    """The perceptual distance of one pair."""
    a, b = ImageSet.pixels_of(student.folder, mine), ImageSet.pixels_of(teacher.folder, theirs)
    return perceptual.distance([a], [b])[0]


def _compare_chunk(
    mine: Path,
    theirs: Path,
    mask: Mask | None,
    details: Sequence[Detail],
    pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]],
) -> list[PictureFidelity]:
    """The pictures of some pairs, which lie in two folders."""
    found = []
    for entry, other in pairs:
        a, b = ImageSet.pixels_of(mine, entry), ImageSet.pixels_of(theirs, other)
        whole = psnr(a, b)
        assert whole is not None
        energy, coherence = bands(a, b)
        found.append(
            PictureFidelity(
                entry["prompt_id"],
                entry["tag"],
                entry["sample"],
                whole,
                psnr(a, b, mask(b)) if mask is not None else None,
                ssim(a, b),
                energy,
                coherence,
                details=_details_of(a, b, [d for d in details if not d.tags or entry["tag"] in d.tags]),
            )
        )
    return found


def _details_of(picture: Pixels, reference: Pixels, details: Sequence[Detail]) -> dict[str, tuple[float, float]]:
    found = {d.name: (d.measure(picture), d.measure(reference)) for d in details}
    return {name: (a, b) for name, (a, b) in found.items() if a is not None and b}


def summary(pictures: Sequence[PictureFidelity], seed: int = 0) -> dict[str, Any]:
    """Medians over pictures with 95 % intervals over prompts, as plain JSON; a measure no picture has is null."""

    def median(values: Sequence[float | None]) -> dict[str, Any] | None:
        kept = [(v, p.prompt_id) for v, p in zip(values, pictures, strict=True) if v is not None]
        if not kept:
            return None
        return statistics.clustered_median([v for v, _ in kept], [c for _, c in kept], seed=seed).to_dict()

    def detail(name: str) -> dict[str, Any]:
        pairs = [p.details.get(name) for p in pictures]
        return {
            "ratio": median([pair and pair[0] / pair[1] for pair in pairs]),
            "own": median([pair and pair[0] for pair in pairs]),
            "teacher": median([pair and pair[1] for pair in pairs]),
        }

    return {
        "psnr": median([p.psnr for p in pictures]),
        "psnr_object": median([p.psnr_object for p in pictures]),
        "ssim": median([p.ssim for p in pictures]),
        "lpips": median([p.lpips for p in pictures]),
        "bands": {
            name: {
                "energy": median([p.energy[i] for p in pictures]),
                "coherence": median([p.coherence[i] for p in pictures]),
            }
            for i, name in enumerate(BANDS)
        },
        "details": {name: detail(name) for name in dict.fromkeys(name for p in pictures for name in p.details)},
        "psnr_ceiling": PSNR_CEILING,
    }


def _check_shapes(picture: Pixels, reference: Pixels) -> None:
    if picture.shape != reference.shape:
        raise EvaluationError(f"pictures of {picture.shape} and {reference.shape} pixels do not compare")
