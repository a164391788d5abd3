"""What a run will take, before it starts: pictures, disk, and (once some pictures are there) time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tritflow.config import bytes_text
from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.images import MANIFEST, META, ImageSetError, Settings, read_manifest, read_meta
from tritflow.formats.environment import free_bytes

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
        told_by: the other folder that `seconds` and the size of a picture come from; None: this one, or nothing.
    """

    model: str
    pictures: int
    present: int
    bytes_needed: int
    bytes_free: int
    seconds: float | None
    told_by: str | None = None

    def check(self) -> None:
        """Raises `EvaluationError` when the disk has no room for what is missing."""
        if self.bytes_needed > self.bytes_free:
            raise EvaluationError(
                f"{self.pictures - self.present:,} pictures of {self.model} need about "
                f"{bytes_text(self.bytes_needed)}, and {bytes_text(self.bytes_free)} are free; "
                "make room or choose another --out"
            )

    def __str__(self) -> str:
        left = self.pictures - self.present
        if not left:
            return f"{self.model}: all {self.pictures:,} pictures are there"
        there = f", {self.present:,} of them there" if self.present else ""
        time = f", {duration(self.seconds)}" if self.seconds is not None else "; time is known after the first batch"
        time += f" (as {self.told_by} took)" if self.told_by and self.seconds is not None else ""
        return (
            f"{self.model}: {self.pictures:,} pictures{there}; to draw {left:,}: about "
            f"{bytes_text(self.bytes_needed)} of {bytes_text(self.bytes_free)} free{time}"
        )


def project(
    folder: str | Path,
    model: str,
    pictures: int,
    settings: Settings,
    *,
    device: str | None = None,
    earlier: bool = True,
) -> Projection:
    """Project a run of `pictures` into `folder`, from the pictures that are there already where there are any.

    Time follows from when those were written: the median gap between batches, so that pauses do not count. Where too
    few are there, it and the size of a picture are those of an earlier folder (`earlier`): one beside this one or in a
    folder beside its parent, of the same size and steps, on `device` where that is named; equal settings before the
    same mode before others, the newest first.
    """
    folder = Path(folder)
    there = _drawn(folder)
    each = settings.height * settings.width * BYTES_PER_PIXEL
    if there:
        each = sum(int(e["bytes"]) for e in there) / len(there)
    pace, told_by = _pace(folder, there), None
    missing = max(0, pictures - len(there))
    if pace is None and missing and earlier:
        for other in _earlier(folder, settings, device):
            try:
                theirs = _drawn(other)
            except ImageSetError:
                continue
            pace = _pace(other, theirs)
            if pace is not None:
                told_by = other.name if other.parent == folder.parent else f"{other.parent.name}/{other.name}"
                each = each if there else sum(int(e["bytes"]) for e in theirs) / len(theirs)
                break
    return Projection(
        model,
        pictures,
        len(there),
        round(missing * each),
        free_bytes(folder),
        None if pace is None else pace * missing,
        told_by,
    )


def _drawn(folder: Path) -> list[dict[str, Any]]:
    """Manifest lines, all ranks', whose picture is there."""
    entries = {e["path"]: e for p in sorted(folder.glob(f"{MANIFEST}*")) for e in read_manifest(p)}
    return [e for e in entries.values() if (folder / e["path"]).is_file()]


def _earlier(folder: Path, settings: Settings, device: str | None) -> Iterator[Path]:
    """Other folders of pictures of the same size and steps, best first."""
    wanted = asdict(settings)
    ranked = []
    for meta in {*folder.parent.glob(f"*/{META}"), *folder.parent.parent.glob(f"*/*/{META}")}:
        try:
            found = read_meta(meta.parent)
        except ImageSetError:
            continue
        theirs = found["settings"]
        alike = all(theirs.get(k) == wanted[k] for k in ("height", "width", "num_inference_steps"))
        if meta.parent != folder and alike and device in (None, found.get("device")):
            mode = theirs.get("extra", {}).get("mode") == wanted["extra"].get("mode")
            ranked.append((theirs != wanted, not mode, -meta.stat().st_mtime, meta.parent))
    for *_, place in sorted(ranked):
        yield place


def _pace(folder: Path, entries: list[dict[str, Any]]) -> float | None:
    """Seconds a picture, from modification times; None when not even two batches are there.

    Pictures of a batch come at once, so gaps are taken over whole batches.
    """
    try:
        batch = int(read_meta(folder).get("batch_size", 1))
    except (ImageSetError, TypeError, ValueError):
        return None
    step = batch * max(1, len(entries) // (64 * batch))
    times = sorted((folder / e["path"]).stat().st_mtime for e in entries)
    gaps = sorted(b - a for a, b in zip(times, times[step:], strict=False))
    return gaps[len(gaps) // 2] / step if gaps else None


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
