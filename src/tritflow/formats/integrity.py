"""Checksums of tensors, the folder's digest, and the `tritflow.*` metadata of a safetensors file.

README.md in this folder is the specification.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from tritflow.config import FORMAT_VERSION
from tritflow.formats.errors import CheckpointError
from tritflow.formats.safetensors_file import SafetensorsFile, dtype_name, raw_bytes, strict_json

VERSION_KEY = "tritflow.version"
CHECKSUMS_KEY = "tritflow.checksums"
LINEARS_KEY = "tritflow.linears"
ARCHITECTURE_KEY = "tritflow.architecture"
_KNOWN = {VERSION_KEY, CHECKSUMS_KEY, LINEARS_KEY, ARCHITECTURE_KEY}
CHECKSUM_DIGITS = 32


def start_sha256(name: str, dtype: str, shape: Iterable[int]) -> Any:
    """The hash object of `tensor_sha256` before the raw bytes."""
    return hashlib.sha256(f"{name}\n{dtype}\n{','.join(map(str, shape))}\n".encode())


def tensor_sha256(name: str, tensor: Tensor) -> str:
    """SHA-256 of `name LF dtype LF d0,d1,... LF` followed by the raw bytes; 64 hex digits.

    The dtype is spelt as in safetensors (`U8`, `BF16`). Contiguous CPU tensors are hashed in place, and the
    interpreter lock is released meanwhile, so threads hash in parallel.
    """
    hasher = start_sha256(name, dtype_name(tensor), tensor.shape)
    hasher.update(raw_bytes(tensor))
    return hasher.hexdigest()


def stored_sha256(file: SafetensorsFile, name: str) -> str:
    """`tensor_sha256` of a tensor on disk, a few MiB at a time."""
    entry = file.entry(name)
    hasher = start_sha256(name, entry.dtype, entry.shape)
    for chunk in file.chunks(name):
        hasher.update(chunk)
    return hasher.hexdigest()


class Digest:
    """The digest of a whole checkpoint: the sum of all tensors' SHA-256 numbers modulo 2^256.

    Order and sharding do not matter, so it can be taken while tensors arrive in any order, from any thread:

        digest = Digest()
        for name, tensor in state_dict.items():
            digest.add(name, tensor)
        assert digest.hexdigest() == config["quantization_config"]["digest"]

    Tensors must have the dtype and shape that they have on disk (hash before any cast).
    """

    def __init__(self) -> None:
        self._sum = 0
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def add(self, name: str, tensor: Tensor) -> str:
        """Hash one tensor as stored and add it. Returns its SHA-256 (64 hex digits).

        Raises:
            CheckpointError: the name was added before.
        """
        sha256 = tensor_sha256(name, tensor)
        self.add_sha256(name, sha256)
        return sha256

    def add_sha256(self, name: str, sha256: str) -> None:
        """Add a tensor by its `tensor_sha256`. Raises `CheckpointError` when the name was added before."""
        with self._lock:
            if name in self._names:
                raise CheckpointError(f"tensor '{name}' occurs twice in this checkpoint")
            self._names.add(name)
            self._sum = (self._sum + int(sha256, 16)) % (1 << 256)

    def __len__(self) -> int:
        return len(self._names)

    def hexdigest(self) -> str:
        """64 lower-case hex digits."""
        return f"{self._sum:064x}"


def architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a transformer's config.json decides the network: `_class_name` and every key without `_` but
    `quantization_config`, as plain JSON. Keys that are null, or that diffusers filled in by default, do not count.
    """
    defaults = config.get("_use_default_values", [])
    chosen = {
        key: value
        for key, value in config.items()
        if key == "_class_name"
        or not (key.startswith("_") or key == "quantization_config" or value is None or key in defaults)
    }
    return json.loads(json.dumps(chosen, sort_keys=True, default=list))


def file_metadata(sha256: Mapping[str, str], linears: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, str]:
    """The `__metadata__` of a safetensors file of the format.

    Args:
        sha256: tensor name -> `tensor_sha256`, at least of every tensor in the file.
        linears: name of each ternary linear in the file -> its in_features.
        config: the folder's config.json.
    """

    def text(value: Any) -> str:
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    return {
        "format": "pt",
        VERSION_KEY: str(FORMAT_VERSION),
        CHECKSUMS_KEY: text({name: value[:CHECKSUM_DIGITS] for name, value in sha256.items()}),
        LINEARS_KEY: text(dict(linears)),
        ARCHITECTURE_KEY: text(architecture(config)),
    }


def check_version(version: Any, where: str) -> None:
    """Raise `CheckpointError` unless `version` (an int or its digits) is one that this tritflow reads."""
    if isinstance(version, str) and re.fullmatch(r"[0-9]{1,9}", version):
        version = int(version)
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{where}: format version {str(version)[:40]!r} is no version: damaged")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"{where}: format version {version} is newer than this tritflow, which reads up to "
            f"{FORMAT_VERSION}; upgrade tritflow"
        )


class FileClaims:
    """What a file's metadata claims about its tensors, checked for form.

    Attributes:
        checksums: tensor name -> first 32 hex digits of its SHA-256 (empty: the file carries none).
        linears: ternary linear -> in_features.
        architecture: the architecture it was written for, or None.

    Raises:
        CheckpointError: another version, an unknown `tritflow.*` key, or malformed values.
    """

    def __init__(self, file: SafetensorsFile) -> None:
        metadata, where = file.metadata, str(file.path)
        unknown = sorted(k for k in metadata if k.startswith("tritflow") and k not in _KNOWN)
        if unknown:
            raise CheckpointError(f"{where}: unknown metadata '{unknown[0][:80]}': damaged or from a newer version")
        if VERSION_KEY in metadata:
            check_version(metadata[VERSION_KEY], where)
        self.checksums = self._object(metadata, CHECKSUMS_KEY, where)
        self.linears = self._object(metadata, LINEARS_KEY, where)
        self.architecture: dict[str, Any] | None = self._object(metadata, ARCHITECTURE_KEY, where) or None
        for name, value in self.checksums.items():
            if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{CHECKSUM_DIGITS}}}", value):
                raise CheckpointError(f"{where}: the checksum of '{name[:120]}' is malformed: damaged")
        for name, value in self.linears.items():
            if type(value) is not int or not 1 <= value < 1 << 31:
                raise CheckpointError(f"{where}: in_features of '{name[:120]}' is {str(value)[:40]}: damaged")
        if self.checksums:
            for name in file.entries:
                if name not in self.checksums:
                    raise CheckpointError(f"{where}: tensor '{name[:120]}' has no checksum: damaged or added later")

    @staticmethod
    def _object(metadata: Mapping[str, str], key: str, where: str) -> dict[str, Any]:
        if key not in metadata:
            return {}
        value = strict_json(metadata[key].encode(), f"{where}: {key}")
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: {key} is not an object: damaged")
        return value
