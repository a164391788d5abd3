"""What all verbs share: where words go, how progress looks, and what an exit code means.

Results go to stdout, everything else to stderr, so that `--json` output can be piped.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

OK, FAILURE, BAD_INPUT, NO_ROOM, INTERRUPTED = 0, 1, 2, 3, 130
"""Exit codes: done; failed on the way; wrong usage or input; device or memory missing; interrupted by the user."""


def say(text: str) -> None:
    """One line for the user, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(data: Any) -> None:
    """The one result of `--json`, on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False))


@contextmanager
def progress(description: str, *, shown: bool = True) -> Iterator[Any]:
    """A bar on stderr; yields `update(done, total)`. Not drawn when stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (shown and console.is_terminal)) as bar:
        task = bar.add_task(description, total=None)

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        yield update


def share_the_cores() -> None:
    """Let threads that wait for each other give their core away soon; to be called before PyTorch is imported.

    OpenMP's threads wait by spinning. Beside another busy process they spin for a thread that gets no core because of
    it, which made a training step five times slower. A short spin remains, for products that follow each other closely.
    What the user set stays.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ["GOMP_SPINCOUNT"] = "1000"


def show_warnings_as_notes() -> None:
    """The house's own warnings become one line each; those of the libraries stay silent without --debug."""

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if category.__module__.startswith("tritflow") or issubclass(category, UserWarning):
            say(f"note: {message}")

    warnings.showwarning = show
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)


def explain(error: BaseException) -> tuple[str, int]:
    """The one line and the exit code for an exception that reached the command line."""
    kind = type(error).__name__
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), kind)
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on where it can", INTERRUPTED
    if isinstance(error, MemoryError) or kind == "OutOfMemoryError":
        return (
            f"out of memory: {first}; try smaller --height and --width, --batch-size 1, --device cpu, or let "
            "`tritflow generate --max-memory SIZE` plan for less",
            NO_ROOM,
        )
    if kind in ("DeviceError", "MemoryPlanError"):
        return first, NO_ROOM
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return first, FAILURE
    ours = type(error).__module__.startswith("tritflow")
    if ours and isinstance(error, ValueError | OSError | LookupError):
        return first, BAD_INPUT
    if isinstance(error, FileExistsError) and error.filename:
        return f"{error.filename} is a file, where a folder is needed; give another path", BAD_INPUT
    if isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError | PermissionError):
        return f"{error.strerror or first}: {error.filename}" if error.filename else first, BAD_INPUT
    if ours or isinstance(error, ValueError | OSError):
        return first, FAILURE
    return f"{kind}: {first} (this is a fault of tritflow; --debug before the verb shows where)", FAILURE
