"""The one exception of this room."""


class CheckpointError(ValueError):
    """Bytes are not what the format says. The message names the file or tensor and what is wrong."""
