"""Whether a bench's files fit on the disk, asked before anything is written."""

from __future__ import annotations

from pathlib import Path

from tritflow.formats.environment import free_bytes
from tritflow.formats.errors import DiskFullError

SLACK = 200_000_000
"""Bytes for headers, checksums and the file system's own, beside files of gigabytes."""


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raises `DiskFullError`, naming `what` and both sizes, unless `needed` bytes are free where `folder` lies."""
    free = free_bytes(folder)
    if free < needed:
        raise DiskFullError(
            f"{folder} has {free / 1e9:.1f} GB free, and {what} take {needed / 1e9:.1f} GB; give a folder on another "
            "disk: --workdir"
        )
