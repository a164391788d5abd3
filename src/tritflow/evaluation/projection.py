"""What a run will take, before it starts: pictures, disk, and (once some pictures are there) time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.images import MANIFEST, Settings, read_manifest

BYTES_PER_PIXEL = 1.8
"""Of a PNG of a detailed picture at zlib's fastest level; taken where no picture is there to measure."""


@dataclass(frozen=True)
class Projection:
    """Of one model's pictures.

    Attributes:
        model: its name.
        pictures: of the whole run, of which `present` are there.
        bytes_needed: for those that are missing.
        bytes_free: on the folder's disk.
        seconds: to draw those that are missing, all processes together; None when nothing is there to tell by.
    """

    model: str
    pictures: int
    present: int
    bytes_needed: int
    bytes_free: int
    seconds: float | None

    def check(self) -> None:
        """Raises `EvaluationError` when the disk has no room for what is missing."""
        if self.bytes_needed > self.bytes_free:
            raise EvaluationError(
                f"{self.pictures - self.present:,} pictures of {self.model} need about "
                f"{_size(self.bytes_needed)}, and {_size(self.bytes_free)} are free; "
                "make room or choose another --out"
            )

    def __str__(self) -> str:
        left = self.pictures - self.present
        if not left:
            return f"{self.model}: all {self.pictures:,} pictures are there"
        there = f", {self.present:,} of them there" if self.present else ""
        time = f", {duration(self.seconds)}" if self.seconds is not None else "; time is known after two batches"
        return (
            f"{self.model}: {self.pictures:,} pictures{there}; to draw {left:,}: about "
            f"{_size(self.bytes_needed)} of {_size(self.bytes_free)} free{time}"
        )


def project(folder: str | Path, model: str, pictures: int, settings: Settings) -> Projection:
    """Project a run of `pictures` into `folder`, from the pictures that are there already where there are any.

    Time follows from when those were written: the median gap between them, so that pauses do not count.
    """
    folder = Path(folder)
    entries = {e["path"]: e for p in sorted(folder.glob(f"{MANIFEST}*")) for e in read_manifest(p)}
    there = [e for e in entries.values() if (folder / e["path"]).is_file()]
    each = settings.height * settings.width * BYTES_PER_PIXEL
    if there:
        each = sum(int(e["bytes"]) for e in there) / len(there)
    missing = max(0, pictures - len(there))
    place = next(p for p in (folder, *folder.absolute().parents) if p.is_dir())
    pace = _pace([folder / e["path"] for e in there])
    return Projection(
        model,
        pictures,
        len(there),
        round(missing * each),
        shutil.disk_usage(place).free,
        None if pace is None else pace * missing,
    )


def _pace(files: list[Path]) -> float | None:
    """Seconds a picture, from modification times. Pictures of a batch come at once, so gaps are taken over eight."""
    if len(files) < 16:
        return None
    times = sorted(f.stat().st_mtime for f in files)
    step = max(8, len(times) // 64)
    gaps = sorted(b - a for a, b in zip(times, times[step:], strict=False))
    return gaps[len(gaps) // 2] / step


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """`3 h 5 min`, `12 min`, `40 s`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def extrapolate(run: dict[str, Any], drawn: int, whole: int) -> str | None:
    """What the whole suite would take, from a run of part of it that drew `drawn` pictures; None when it drew none."""
    seconds = (run.get("seconds") or {}).get("drawing")
    if not drawn or not seconds:
        return None
    return f"the whole suite ({whole:,} pictures) would take about {duration(seconds / drawn * whole)} to draw here"
