"""Which share of a run is this process's: what torchrun and accelerate say in the environment."""

from __future__ import annotations

import os

from tritflow.evaluation.api import EvaluationError


def shard_of_environment() -> tuple[int, int]:
    """(rank, number of processes) from RANK and WORLD_SIZE; (0, 1) outside of a launcher.

    Raises `EvaluationError` when they make no sense.
    """
    world = number_of_environment("WORLD_SIZE", 1)
    rank = number_of_environment("RANK", 0)
    if world < 1 or not 0 <= rank < world:
        raise EvaluationError(f"RANK={rank} and WORLD_SIZE={world} do not go together; ranks run from 0 to size - 1")
    if world > 1 and "RANK" not in os.environ:
        raise EvaluationError(f"WORLD_SIZE is {world} but RANK is not set; start with torchrun or accelerate launch")
    return rank, world


def device_of_environment(device: str | None) -> str | None:
    """The GPU of this process (LOCAL_RANK) when a launcher started several and none was named by number.

    More processes than GPUs share them: small models are bound by what the processor does for them.
    """
    import torch

    if "LOCAL_RANK" not in os.environ or device not in (None, "auto", "cuda") or not torch.cuda.is_available():
        return device
    return f"cuda:{number_of_environment('LOCAL_RANK', 0) % torch.cuda.device_count()}"


def number_of_environment(name: str, default: int) -> int:
    """A whole number in an environment variable; `default` where there is none. `EvaluationError` for anything else."""
    text = os.environ.get(name, "")
    try:
        return int(text) if text else default
    except ValueError:
        raise EvaluationError(f"{name}={text!r} is not a number") from None
