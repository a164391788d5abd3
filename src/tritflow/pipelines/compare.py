"""The same prompts from the same noise with several models, side by side in one picture with a similarity."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tritflow.pipelines.generate import GenerationError, generate
from tritflow.pipelines.loading import ModelError, configure_, generation_defaults, load_pipeline

_MARGIN = 12
_INK, _PAPER, _FAINT = (20, 20, 20), (255, 255, 255), (110, 110, 110)


@dataclass(frozen=True)
class Comparison:
    """What `compare` drew.

    Attributes:
        labels: one a model; the first is the reference.
        prompts: one a row.
        seeds: one a row.
        images: `images[m][p]` is model m's picture of prompt p.
        psnr: `psnr[m][p]` in dB against the reference; infinite for an identical picture.
    """

    labels: tuple[str, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    images: tuple[tuple[Image.Image, ...], ...]
    psnr: tuple[tuple[float, ...], ...]

    def grid(self, across: bool = False) -> Image.Image:
        """One picture, PSNR to the first model's under each: a row a prompt and a column a model, or, with `across`,
        a column a prompt and a row a model."""
        notes = [["reference" if m == 0 else format_psnr(db) for db in row] for m, row in enumerate(self.psnr)]
        prompts = [f"{p} (seed {s})" for p, s in zip(self.prompts, self.seeds, strict=True)]
        if across:
            swapped, under = list(zip(*self.images, strict=True)), list(zip(*notes, strict=True))
            return draw_grid(prompts, self.labels, swapped, under)
        return draw_grid(self.labels, prompts, self.images, notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; an infinite PSNR becomes null."""
        finite = [[None if math.isinf(db) else round(db, 4) for db in row] for row in self.psnr]
        return {
            "models": list(self.labels),
            "prompts": list(self.prompts),
            "seeds": list(self.seeds),
            "psnr_db": finite,
        }


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit RGB pictures in dB: 10 log10(255^2 / mean squared difference).

    Raises:
        ValueError: the sizes differ.
    """
    a, b = (np.asarray(i.convert("RGB"), dtype=np.float64) for i in (image, reference))
    if a.shape != b.shape:
        raise ValueError(f"pictures of {image.size} and {reference.size} pixels cannot be compared")
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def format_psnr(db: float) -> str:
    """`PSNR 31.42 dB`, or `identical`."""
    return "identical" if math.isinf(db) else f"PSNR {db:.2f} dB"


def compare(
    models: Sequence[str | Path],
    prompts: Sequence[str],
    seeds: int | Sequence[int] = 0,
    *,
    labels: Sequence[str] | None = None,
    base: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    mode: str | None = None,
    backend: str | None = None,
    on_model: Callable[[str], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Draw every prompt with every model, one model in memory at a time.

    The models share one size, number of steps and guidance: the first model's defaults, unless given.

    Args:
        models: at least two, as `load_pipeline` takes them; the first is the reference.
        prompts: one row each.
        seeds: one a prompt, or one for all.
        labels: what stands over the columns; default the models' names.
        base, device, dtype: see `load_pipeline`.
        mode, backend: for the ternary models among them.
        on_model: called with each label before it is loaded.
        settings: passed on to `generate`.

    Raises:
        GenerationError: fewer than two models.
        ValueError: labels that do not match; and what loading and drawing raise.
    """
    if len(models) < 2:
        raise GenerationError("compare needs at least two models: --models FIRST SECOND")
    names = tuple(labels) if labels is not None else _short_names(models)
    if len(names) != len(models):
        raise ValueError(f"{len(models)} models need as many labels, not {len(names)}")
    images: list[tuple[Image.Image, ...]] = []
    for name, model in zip(names, models, strict=True):
        if on_model is not None:
            on_model(name)
        pipe = load_pipeline(model, base=base, device=device, dtype=dtype)
        if mode is not None or backend is not None:
            # A dense model keeps its own arithmetic: it is what the others are compared with.
            with contextlib.suppress(ModelError):
                configure_(pipe, mode=mode, backend=backend)
        if not images:
            first = generation_defaults(pipe)
            settings = {**first.__dict__, **{k: v for k, v in settings.items() if v is not None}}
        images.append(tuple(generate(pipe, list(prompts), seeds, **settings)))
        del pipe
        gc.collect()
    numbers = (seeds,) * len(prompts) if isinstance(seeds, int) else tuple(seeds)
    scores = tuple(tuple(psnr(i, r) for i, r in zip(row, images[0], strict=True)) for row in images)
    return Comparison(names, tuple(prompts), numbers, tuple(images), scores)


def _short_names(models: Sequence[str | Path]) -> tuple[str, ...]:
    """Last parts of the paths, with as many parents as tell them apart."""
    parts = [Path(m).expanduser().parts or (str(m),) for m in models]
    for depth in range(1, max(map(len, parts)) + 1):
        names = tuple("/".join(p[-depth:]) for p in parts)
        if len(set(names)) == len(set(parts)):
            break
    return names


def draw_grid(
    columns: Sequence[str],
    rows: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    notes: Sequence[Sequence[str]] | None = None,
) -> Image.Image:
    """Captioned pictures on white.

    Args:
        columns: captions over the columns.
        rows: captions over the rows, shortened to the width.
        images: `images[column][row]`.
        notes: under each picture, same order.

    Returns:
        An RGB picture. Pictures smaller than 192 pixels are enlarged by a whole factor, without smoothing.
    """
    factor = max(1, math.ceil(192 / max(images[0][0].size)))
    cell_width = max(i.width for column in images for i in column) * factor
    cell_height = max(i.height for column in images for i in column) * factor
    size = max(13, cell_width // 28)
    font, line = ImageFont.load_default(size), round(size * 1.5)
    row_height = line + cell_height + (line if notes else 0) + _MARGIN
    width = _MARGIN + len(columns) * (cell_width + _MARGIN)
    canvas = Image.new("RGB", (width, _MARGIN + line + len(rows) * row_height), _PAPER)
    draw = ImageDraw.Draw(canvas)
    for c, caption in enumerate(columns):
        left = _MARGIN + c * (cell_width + _MARGIN)
        draw.text((left, _MARGIN // 2), _fit(draw, caption, font, cell_width), _INK, font)
        for r, row in enumerate(rows):
            top = _MARGIN + line + r * row_height
            if c == 0:
                draw.text((left, top), _fit(draw, row, font, width - 2 * _MARGIN), _FAINT, font)
            image = images[c][r].convert("RGB")
            image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
            canvas.paste(image, (left, top + line))
            if notes:
                text = _fit(draw, notes[c][r], font, cell_width)
                draw.text((left, top + line + cell_height + 2), text, _FAINT, font)
    return canvas


def _fit(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """`text` on one line, cut with dots where it would pass `width` pixels."""
    text = " ".join(text.split())[:400]
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "...", font) > width:
        text = text[:-1]
    return text + "..."
