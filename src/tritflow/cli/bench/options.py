"""Options that the benches share, and where their results go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli.console import say

Results = Annotated[
    Path | None,
    typer.Option("--results", metavar="DIR", help="Also append the result to this folder of results."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout and nothing else.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of PyTorch on the CPU (default: its own).")]
Note = Annotated[str, typer.Option("--note", help="Kept with the result, for instance that the machine was busy.")]


def store(folder: Path | None, topic: str, runs: list[dict[str, Any]]) -> None:
    if folder is None:
        return
    from tritflow.results import append, path_for

    for run in runs:
        append(path_for(folder, topic, run["device"]), topic, run)
    say(f"appended to {path_for(folder, topic, runs[0]['device'])}")


def whole_numbers(option: str, text: str) -> list[int]:
    """Whole numbers above 0, joined by commas. Raises `ConfigError` with the option's name for anything else."""
    from tritflow.config import ConfigError

    parts = text.split(",")
    numbers = [int(part) for part in parts if part.strip().isdigit()]
    if len(numbers) != len(parts) or not all(numbers):
        raise ConfigError(f"{option} {text}: give whole numbers above 0, joined by commas")
    return numbers


def set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
