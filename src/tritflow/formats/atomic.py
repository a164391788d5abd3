"""Files that appear whole or not at all, and a full disk said in one line."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tritflow.formats.errors import DiskFullError

_FULL = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def atomic_file(path: str | Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Write `path` through a temporary file beside it: flushed, synced to disk, then renamed.

    After an error, or a kill at any moment, `path` is either absent, the former file, or the whole new one.

    Args:
        path: the file to create or replace; its folder must exist.
        sync: off for files that are verified before use and can be made again: then a kill still cannot leave half
            a file, but a power cut can.

    Yields:
        The open temporary file.

    Raises:
        DiskFullError: no space left; the temporary file has been removed.
    """
    path = Path(path)
    temporary = temporary_name(path)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if sync:
            sync_folder(path.parent)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise


def temporary_name(path: Path) -> Path:
    """Where `atomic_file` writes before the rename: fixed, so that a killed run's leftover is overwritten.

    Processes of one launcher (RANK) may write the same file at once, so that each has a name of its own.
    """
    rank = os.environ.get("RANK", "0")
    return path.with_name(f".{path.name}.tmp" if rank == "0" else f".{path.name}.{rank}.tmp")


def is_disk_full(error: BaseException) -> bool:
    """Whether the operating system says that the disk (or the quota) is full, and nobody has put it in words yet."""
    return isinstance(error, OSError) and error.errno in _FULL and not isinstance(error, DiskFullError)


def disk_full(path: Path) -> DiskFullError:
    """The one line for a full disk, with what is free now."""
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e9:.2f} GB free"
    except OSError:
        free = "free space unknown"
    return DiskFullError(
        f"the disk is full while writing {path} ({free}): make room and run the same command again; "
        "it goes on where it stopped"
    )


def write_atomic(path: str | Path, data: bytes) -> None:
    """`atomic_file` for bytes at hand. Raises `DiskFullError` when no space is left."""
    with atomic_file(path) as file:
        file.write(data)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system allows it."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # folders cannot be opened on Windows
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
