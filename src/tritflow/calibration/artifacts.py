"""Files of an artifact folder: written whole or not at all, with a meta.json that says where they come from."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

import tritflow
from tritflow.formats.atomic import atomic_file, write_atomic
from tritflow.formats.safetensors_file import dtype_name, layout, raw_bytes, write_header


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically, making its folder. Raises `DiskFullError` when no space is left."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, data)


def write_json(path: Path, data: Any) -> None:
    """Indented JSON, keys in the order given, atomically."""
    write_bytes(path, (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode())


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> str:
    """A safetensors file, atomically, a tensor at a time: those on a GPU are never all in memory. `metadata` is any
    JSON value. Returns the hex SHA-256 of its bytes.

    It is kept as one string, since several keys come out in an order that changes from run to run, and the same
    content is to give the same bytes.
    """
    entries = layout({name: (dtype_name(t), tuple(t.shape)) for name, t in tensors.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        hashing = _Hashing(file)
        write_header(hashing, entries, {} if metadata is None else {"tritflow": json.dumps(metadata, sort_keys=True)})
        for name in entries:
            hashing.write(raw_bytes(tensors[name]))
    return hashing.digest.hexdigest()


class _Hashing:
    """Writes to a file and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.digest = file, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self.digest.update(data)
        self.file.write(data)


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises `ValueError` with the file's name if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from None
    except ValueError:
        raise ValueError(f"{path} is not JSON: it is damaged, remove it to begin again") from None


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def provenance(device: torch.device | str) -> dict[str, Any]:
    """Versions and device for a meta.json. No time and no host name: the same run gives the same bytes."""
    device = torch.device(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "versions": {
            "tritflow": tritflow.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": f"{device.type}: {name}",
    }
