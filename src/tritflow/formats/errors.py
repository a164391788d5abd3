"""The exceptions of this room."""

import errno


class CheckpointError(ValueError):
    """Bytes are not what the format says. The message names the file or tensor and what is wrong."""


class DiskFullError(CheckpointError, OSError):
    """The disk ran full while writing. Nothing half-written is left; the same call resumes. `errno` is ENOSPC."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.errno = errno.ENOSPC
