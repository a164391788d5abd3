"""Results files: append-only JSON, one file a topic and device, read by the report.

    {"schema": 1, "topic": "scenes", "runs": [{"id": ..., "device": ..., "versions": {...}, ...}, ...]}

A run is whatever its topic measures, plus where it came from (`provenance`). Runs are appended, never
changed: each carries the hash of its own content as `id`, which reading verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from tritflow.formats.atomic import write_atomic
from tritflow.formats.environment import usable_cores

SCHEMA = 1
_PACKAGES = ("tritflow", "torch", "diffusers", "transformers", "triton", "numpy", "pillow")


class ResultsError(ValueError):
    """A results file is broken, altered, or of another topic. The message names the file and the way out."""


def write_atomically(path: str | Path, data: bytes) -> None:
    """`formats.atomic.write_atomic`, making the folder first. Raises `DiskFullError` when no space is left."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def canonical(data: Any) -> str:
    """JSON with sorted keys and no blanks; NaN and infinity are refused, since JSON has neither."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def digest(data: Any, length: int = 16) -> str:
    """First `length` hex digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(data).encode()).hexdigest()[:length]


def device_name(device: str = "cpu") -> str:
    """What runs are compared by: the GPU's name, or the CPU's model with the cores this process may use."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        model = found.group(1).strip() if found else model
    except OSError:
        pass
    cores = usable_cores()
    return f"{model}, {cores} core{'s' if cores != 1 else ''}"


def portable(argument: str) -> str:
    """An absolute path by its last part: where a folder lay on one machine means nothing on the next."""
    return Path(argument).name if Path(argument).is_absolute() else argument


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Device, versions, command line and time (UTC) of a run; nothing is imported to find the versions."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "device": device_name(device),
        "versions": versions,
        "command": shlex.join([Path(sys.argv[0]).name, *map(portable, sys.argv[1:])]),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def slug(text: str) -> str:
    """Lower-case words joined by hyphens, for file names."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def path_for(folder: str | Path, topic: str, device: str) -> Path:
    """`folder/TOPIC-DEVICE.json`."""
    return Path(folder) / f"{topic}-{slug(device)}.json"


def read(path: str | Path, topic: str | None = None) -> list[dict[str, Any]]:
    """All runs of a results file, oldest first, each with its `topic`.

    Raises `ResultsError` when the file is no results file, of a newer schema, of another topic, or altered.
    """
    path = Path(path)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ResultsError(f"{path}: there is no such results file") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ResultsError(f"{path}: not a whole JSON file ({e}); restore it from version control") from None
    if not isinstance(data, dict) or not isinstance(data.get("runs"), list) or "schema" not in data:
        raise ResultsError(f"{path}: not a results file (it needs 'schema', 'topic' and 'runs')")
    if data["schema"] != SCHEMA:
        raise ResultsError(f"{path}: schema {data['schema']!r}; this tritflow reads {SCHEMA}; upgrade tritflow")
    if topic is not None and data.get("topic") != topic:
        raise ResultsError(f"{path}: holds results of '{data.get('topic')}', not of '{topic}'")
    for i, run in enumerate(data["runs"]):
        body = {k: v for k, v in run.items() if k != "id"} if isinstance(run, dict) else None
        if body is None or run.get("id") != digest(body):
            raise ResultsError(
                f"{path}: run {i} was altered after it was written (its id does not match its content); "
                "results are measured again, not edited"
            )
    return [{**run, "topic": data.get("topic")} for run in data["runs"]]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, so that two appends at once lose neither (POSIX; elsewhere without a lock)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # pragma: no cover
        yield
        return
    # The folder itself is the lock: a lock file would have to be deleted, which cannot be done safely.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def append(path: str | Path, topic: str, run: dict[str, Any]) -> dict[str, Any]:
    """Add one run to a results file (made when missing), atomically; returns the run with its `id`.

    A run that is there already, to the last digit, is not added again: commands that resume may tell what they know.

    Raises `ResultsError` when the file is damaged or of another topic, ValueError on NaN or infinity.
    """
    path = Path(path)
    # Through JSON once, so that the hash is of what a reader will see; the order of keys is kept for tables.
    body = json.loads(json.dumps({k: v for k, v in run.items() if k not in ("id", "topic")}, allow_nan=False))
    entry = {"id": digest(body), **body}
    with _locked(path):
        runs = [{k: v for k, v in r.items() if k != "topic"} for r in read(path, topic)] if path.exists() else []
        if any(run["id"] == entry["id"] for run in runs):
            return entry
        data = {"schema": SCHEMA, "topic": topic, "runs": [*runs, entry]}
        write_atomically(path, (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode())
    return entry
