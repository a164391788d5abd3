"""Ternary transformer folders: opening, reading and verifying (writing is in writer.py; all names are here).

A folder is opened by its headers alone; tensors are verified against their checksums as they are read, and
`verify_folder` reads everything. README.md in this folder is the specification.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.config import TernaryConfig
from tritflow.formats.architecture import check_shapes, is_known
from tritflow.formats.errors import CheckpointError, DiskFullError
from tritflow.formats.folder import TensorFolder, read_json_object
from tritflow.formats.integrity import (
    CHECKSUM_DIGITS,
    Digest,
    FileClaims,
    architecture,
    check_version,
    file_metadata,
    stored_sha256,
    tensor_sha256,
)
from tritflow.formats.packing import check_packed, packed_width
from tritflow.formats.writer import TransformerWriter, write_folder

__all__ = [
    "CheckpointError",
    "Digest",
    "DiskFullError",
    "StoredLinear",
    "TernaryFolder",
    "TransformerWriter",
    "file_metadata",
    "parse_quantization_config",
    "tensor_sha256",
    "verify_folder",
    "write_folder",
]


@dataclass(frozen=True)
class StoredLinear:
    """One ternary linear as stored: W[n, k] = weight_scale[n] * T[n, k] * input_scale[k].

    Attributes:
        packed: uint8 [N, packed_width(K)].
        in_features: K.
        weight_scale: bf16 [N].
        input_scale: bf16 [K], or None without column scales.
        bias: [N], or None.
    """

    packed: Tensor
    in_features: int
    weight_scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None


def parse_quantization_config(data: Any, where: str = "quantization_config") -> tuple[TernaryConfig, str]:
    """Read the `quantization_config` of a config.json.

    Args:
        data: the JSON value.
        where: the file's name, for messages.

    Returns:
        The settings, and the digest that the tensors must have (64 hex digits).

    Raises:
        CheckpointError: missing, of another method or version, or malformed.
    """
    if not isinstance(data, dict):
        raise CheckpointError(f"{where}: no quantization_config: not a ternary model, or damaged")
    data = dict(data)
    method, digest = data.pop("quant_method", None), data.pop("digest", None)
    if method != "tritflow":
        raise CheckpointError(f"{where}: quant_method is {str(method)[:60]!r}, not 'tritflow'")
    if "version" not in data:
        raise CheckpointError(f"{where}: no format version: damaged")
    check_version(data["version"], where)
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise CheckpointError(f"{where}: the digest is missing or malformed: damaged")
    for key in ("targets", "skip"):
        if not isinstance(data.get(key, []), list) or not all(isinstance(p, str) for p in data.get(key, [])):
            raise CheckpointError(f"{where}: '{key}' is not a list of patterns: damaged")
    if not isinstance(data.get("column_scale", False), bool):
        raise CheckpointError(f"{where}: 'column_scale' is neither true nor false: damaged")
    try:
        return TernaryConfig.from_dict(data), digest
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{where}: {error}") from error


class TernaryFolder(TensorFolder):
    """A ternary transformer folder, opened by its headers.

    Everything that can be told without reading the data is checked here: versions, settings, that names, dtypes
    and shapes fit the settings and the architecture, and that config.json is the one the weights were written with.

    Attributes:
        config: the transformer's config.json, without `quantization_config`.
        ternary: its settings.
        digest: the digest that config.json promises.
        linears: ternary linear -> in_features.

    Raises:
        CheckpointError: anything amiss, by name.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a folder" if path.exists() else f"{path} does not exist")
        super().__init__(path)
        where = path / "config.json"
        self.config: dict[str, Any] = read_json_object(where)
        quantization = self.config.pop("quantization_config", None)
        self.ternary, self.digest = parse_quantization_config(quantization, str(where))
        self._checksums: dict[str, str] = {}
        claimed: dict[str, int] = {}
        for file in self.files:
            claims = FileClaims(file)
            self._checksums.update({n: claims.checksums[n] for n in file.entries if n in claims.checksums})
            claimed.update(claims.linears)
            if claims.architecture is not None:
                self._check_architecture(claims.architecture, where)
        self.linears = self._find_linears(claimed)
        self._check_linears()
        if is_known(self.config):
            shapes = {n: self.entry(n).shape for n in self.names() if not self._is_extra(n)}
            for name, in_features in self.linears.items():
                shapes[f"{name}.weight"] = (shapes[f"{name}.weight"][0], in_features)
            check_shapes(self.config, shapes, str(path))

    def _check_architecture(self, written: Mapping[str, Any], where: Path) -> None:
        found = architecture(self.config)
        # A later diffusers may add settings of its own on saving again; none may change or vanish.
        for key, value in written.items():
            if found.get(key) != value:
                raise CheckpointError(
                    f"{where}: '{key[:60]}' is {str(found.get(key))[:60]}, but the weights were written for "
                    f"{str(value)[:60]}: config.json was damaged or exchanged"
                )

    def _find_linears(self, claimed: Mapping[str, int]) -> dict[str, int]:
        linears = {}
        for name in self.names():
            if not name.endswith(".weight_scale"):
                continue
            linear = name.removesuffix(".weight_scale")
            if linear in claimed:
                linears[linear] = claimed[linear]
            elif f"{linear}.input_scale" in self:
                linears[linear] = self.entry(f"{linear}.input_scale").shape[0]
            else:
                raise CheckpointError(f"{self.path}: in_features of '{linear[:120]}' is not recorded: damaged")
        lost = sorted(n for n in claimed if n not in linears)
        if lost:
            raise CheckpointError(f"{self.path}: '{lost[0][:120]}' has no weight_scale: damaged")
        return linears

    def _check_linears(self) -> None:
        for name, in_features in self.linears.items():
            rows = self.entry(f"{name}.weight_scale").shape
            expected: dict[str, tuple[str, tuple[int, ...]]] = {
                "weight": ("U8", (*rows, packed_width(in_features, self.ternary.packing))),
                "weight_scale": ("BF16", rows),
            }
            if self.ternary.column_scale:
                expected["input_scale"] = ("BF16", (in_features,))
            elif f"{name}.input_scale" in self:
                raise CheckpointError(f"{self.path}: '{name}' has an input_scale, but column_scale is off: damaged")
            for part, want in expected.items():
                entry = self.entry(f"{name}.{part}")
                if len(rows) != 1 or (entry.dtype, entry.shape) != want:
                    raise CheckpointError(
                        f"{self.path}: '{name}.{part}' is {entry.dtype} {list(entry.shape)}, but "
                        f"{self.ternary.packing} with {in_features} input features needs {want[0]} {list(want[1])}: "
                        "damaged"
                    )
            if not self.ternary.matches(name):
                raise CheckpointError(f"{self.path}: '{name}' is ternary, but targets and skip leave it out: damaged")
        for name in self.names():
            module = name.removesuffix(".weight")
            if name.endswith(".weight") and module not in self.linears and len(self.entry(name).shape) == 2:
                if self.ternary.matches(module):
                    raise CheckpointError(f"{self.path}: '{module}' is dense, but targets make it ternary: damaged")
                if self.entry(name).dtype == "U8":
                    raise CheckpointError(f"{self.path}: '{name}' is packed but has no weight_scale: damaged")

    def _is_extra(self, name: str) -> bool:
        module, _, part = name.rpartition(".")
        return part in ("weight_scale", "input_scale") and module in self.linears

    def tensor(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read a tensor, verified against its checksum (rows alone cannot be).

        Raises:
            CheckpointError: no such tensor, or its bytes changed since they were written.
        """
        tensor = super().tensor(name, rows, device)
        if rows is None and name in self._checksums:
            self._compare(name, tensor_sha256(name, tensor))
        return tensor

    def _compare(self, name: str, sha256: str) -> None:
        if name in self._checksums and sha256[:CHECKSUM_DIGITS] != self._checksums[name]:
            raise CheckpointError(
                f"{self.file(name).path}: tensor '{name}' does not match its checksum: the file is damaged; "
                "fetch or quantize it again"
            )

    def checksum(self, name: str) -> str:
        """A tensor's recorded checksum (32 hex digits), or that of its bytes where none is recorded."""
        return self._checksums.get(name) or stored_sha256(self.file(name), name)[:CHECKSUM_DIGITS]

    def linear(self, name: str) -> StoredLinear:
        """Read one ternary linear, verified.

        Raises:
            CheckpointError: no such ternary linear, or damaged.
        """
        if name not in self.linears:
            raise CheckpointError(f"{self.path}: '{name}' is not a ternary linear of this model")

        def optional(part: str) -> Tensor | None:
            return self.tensor(f"{name}.{part}") if f"{name}.{part}" in self else None

        return StoredLinear(
            self.tensor(f"{name}.weight"),
            self.linears[name],
            self.tensor(f"{name}.weight_scale"),
            optional("input_scale"),
            optional("bias"),
        )

    def dense_names(self) -> list[str]:
        """Names of the tensors that belong to no ternary linear."""
        own = {f"{n}.{p}" for n in self.linears for p in ("weight", "weight_scale", "input_scale", "bias")}
        return [name for name in self.names() if name not in own]

    def verify(self) -> None:
        """Read every byte: each tensor against its checksum, all against the digest, each packed weight for codes
        that no trit has.

        Raises:
            CheckpointError: naming the first damaged tensor.
        """
        digest = Digest()
        for name in self.names():
            sha256 = stored_sha256(self.file(name), name)
            self._compare(name, sha256)
            digest.add_sha256(name, sha256)
        if digest.hexdigest() != self.digest:
            raise CheckpointError(
                f"{self.path}: the tensors do not match the digest in config.json: a file is damaged, or belongs to "
                "another model"
            )
        for name, in_features in self.linears.items():
            packed = TensorFolder.tensor(self, f"{name}.weight")
            try:
                check_packed(packed, in_features, self.ternary.packing)
            except CheckpointError as error:
                raise CheckpointError(f"{self.path}: '{name}.weight': {error}") from error


def verify_folder(path: str | Path) -> TernaryFolder:
    """Open a ternary transformer folder and read every byte of it.

    Returns:
        The folder, found sound.

    Raises:
        CheckpointError: one line naming the damaged file or tensor.
    """
    folder = TernaryFolder(path)
    folder.verify()
    return folder
