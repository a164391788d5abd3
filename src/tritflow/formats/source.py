"""Dense checkpoints, read a tensor at a time under diffusers' names, whatever they look like on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.formats.architecture import Shape, check_shapes, flux1_shapes, is_known, known_classes, shapes_of
from tritflow.formats.errors import CheckpointError
from tritflow.formats.folder import TensorFolder, read_json_object
from tritflow.formats.locate import resolve_transformer
from tritflow.formats.safetensors_file import DTYPES, SafetensorsFile, straight, strict_json
from tritflow.formats.single_file import Piece, bfl_pieces, infer_config, strip_prefix, swap_halves

_FLOATS = {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}
_SCALES = ("scale_weight", "weight_scale")
_IGNORED = ("scale_input", "input_scale", "scaled_fp8", "comfy_quant")


class Source(ABC):
    """A dense transformer of a known class on disk. Nothing is read but headers until a tensor is asked for.

    Attributes:
        path: the transformer folder, or the single file.
        config: the diffusers transformer config.
        files: the safetensors files behind it.
    """

    path: Path
    config: dict[str, Any]
    files: list[SafetensorsFile]

    def names(self) -> list[str]:
        """diffusers tensor names in the model's order: embedders, blocks one after the other, output."""
        return list(self._shapes)

    def shapes(self) -> dict[str, Shape]:
        """Tensor name -> shape, in the model's order; linear weights are [out_features, in_features]."""
        return dict(self._shapes)

    @functools.cached_property
    def _shapes(self) -> dict[str, Shape]:
        return shapes_of(self.config)

    def shape(self, name: str) -> Shape:
        """Raises `CheckpointError` when there is no such tensor."""
        if name not in self._shapes:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        return self._shapes[name]

    @abstractmethod
    def stored_dtype(self, name: str) -> str:
        """The dtype on disk, spelt as in safetensors."""

    def tensor(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor to `device`: fresh, contiguous, as stored; fp8 becomes bf16, times its scale if it has one.

        Raises:
            CheckpointError: no such tensor, or the file shrank meanwhile.
        """
        return self._dense(name, straight(device)).to(device)  # not every device knows fp8

    @abstractmethod
    def _dense(self, name: str, device: torch.device) -> Tensor:
        """`tensor`, to the CPU or a CUDA device."""

    def fingerprint(self) -> str:
        """A short name for these weights, from the config, the headers and samples of the data: 16 hex digits.

        Cheap (no full read), the same wherever the files lie; meant to tell jobs apart, not to detect damage.
        """
        hasher = hashlib.sha256(json.dumps(self.config, sort_keys=True, default=str).encode())
        for file in self.files:
            size = file.path.stat().st_size
            hasher.update(f"{size} {sorted(file.entries)}".encode())
            with open(file.path, "rb") as stream:
                for i in range(64):
                    stream.seek(size * i // 64)
                    hasher.update(stream.read(512))
        return hasher.hexdigest()[:16]


class FolderSource(Source):
    """A diffusers `transformer/` folder, sharded or not.

    Raises:
        CheckpointError: another class of model, quantized already, or tensors that do not fit config.json.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = read_json_object(path / "config.json")
        kind = config.get("_class_name")
        if not is_known(config):
            known = ", ".join(known_classes())
            raise CheckpointError(f"{path} is a {str(kind)[:80]}; tritflow quantizes FLUX transformers ({known})")
        quantization = config.get("quantization_config")
        if quantization is not None:
            method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
            raise CheckpointError(f"{path} is quantized already ({str(method)[:60]}); give the dense model")
        shapes_of(config)
        self.config = config
        self._folder = TensorFolder(path)
        self.files = self._folder.files
        check_shapes(config, {n: self._folder.entry(n).shape for n in self._folder.names()}, str(path))
        for name in self._folder.names():
            _require_float(self._folder.entry(name).dtype, name, path)

    def stored_dtype(self, name: str) -> str:
        return self._folder.entry(name).dtype

    def _dense(self, name: str, device: torch.device) -> Tensor:
        return _to_dense(self._folder.tensor(name, device=device), None)


class SingleFileSource(Source):
    """One safetensors file with Black Forest Labs' names (or diffusers'), as finetunes are shipped.

    Args:
        path: the file.
        config: the diffusers config, when it is known; inferred from names and shapes otherwise.

    Raises:
        CheckpointError: not a FLUX.1 transformer, tensors left over, or quantized in a way that is not fp8.
    """

    def __init__(self, path: Path, config: Mapping[str, Any] | None = None) -> None:
        self.path = path
        file = SafetensorsFile(path)
        self.files = [file]
        # Newer files of some tools spell the norm's parameter `weight`.
        self._names = {
            n.replace("_norm.weight", "_norm.scale") if ".norm." in n else n: stored
            for n, stored in strip_prefix(file.entries, str(path)).items()
        }
        self._check_quantization()
        scales = {n for n in self._names if n.rpartition(".")[2] in (*_SCALES, *_IGNORED)}
        shapes = {n: file.entry(stored).shape for n, stored in self._names.items() if n not in scales}
        self.config = infer_config(shapes, str(path), config)
        if "x_embedder.weight" in shapes:
            self._pieces = {n: Piece(n, 0, s[0]) for n, s in flux1_shapes(self.config).items()}
        else:
            self._pieces = bfl_pieces(self.config)
        self._check(shapes)

    def _check(self, shapes: Mapping[str, Shape]) -> None:
        rows: dict[str, int] = {}
        for name, shape in flux1_shapes(self.config).items():
            piece = self._pieces[name]
            stored = shapes.get(piece.source)
            if stored is None:
                raise CheckpointError(f"{self.path}: tensor '{piece.source}' is missing")
            if len(stored) != len(shape) or stored[0] < piece.stop or stored[1:] != shape[1:]:
                raise CheckpointError(
                    f"{self.path}: '{piece.source}' has shape {list(stored)}, which does not hold {list(shape)} "
                    f"for '{name}'"
                )
            rows[piece.source] = max(rows.get(piece.source, 0), piece.stop)
            _require_float(self.stored_dtype(name), piece.source, self.path)
        for source, stored in shapes.items():
            used = rows.get(source)
            if used is None:
                raise CheckpointError(f"{self.path}: tensor '{source[:120]}' belongs to no FLUX.1 transformer")
            if used != stored[0]:
                raise CheckpointError(f"{self.path}: '{source}' has {stored[0]} rows where {used} are expected")

    def _check_quantization(self) -> None:
        for name, stored in self._names.items():
            if name.endswith(".comfy_quant"):
                note = strict_json(self.files[0].tensor(stored).numpy().tobytes(), f"{self.path}: {stored[:120]}")
                kind = note.get("format") if isinstance(note, dict) else None
                if kind not in ("float8_e4m3fn", "float8_e5m2"):
                    raise CheckpointError(f"{self.path}: quantized as {str(kind)[:60]}; tritflow reads dense and fp8")
            if ".quant_state." in name or name.endswith((".absmax", ".qweight", ".scales")):
                raise CheckpointError(f"{self.path} is quantized ('{name[:100]}'); give the dense or fp8 file")

    def stored_dtype(self, name: str) -> str:
        return self.files[0].entry(self._names[self._piece(name).source]).dtype

    def _piece(self, name: str) -> Piece:
        if name not in self._pieces:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        return self._pieces[name]

    def _dense(self, name: str, device: torch.device) -> Tensor:
        piece = self._piece(name)
        rows = slice(piece.start, piece.stop)
        tensor = self.files[0].tensor(self._names[piece.source], rows, device)
        if piece.swapped:
            tensor = swap_halves(tensor)
        scale = self._scale(piece)
        return _to_dense(tensor, None if scale is None else scale.to(device))

    def _scale(self, piece: Piece) -> Tensor | None:
        if not piece.source.endswith(".weight"):
            return None
        module = piece.source.removesuffix(".weight")
        for suffix in _SCALES:
            stored = self._names.get(f"{module}.{suffix}")
            if stored is None:
                continue
            scale = self.files[0].tensor(stored).float().reshape(-1)
            total = self.files[0].entry(self._names[piece.source]).shape[0]
            if scale.numel() == 1:
                return scale
            if scale.numel() != total:
                raise CheckpointError(
                    f"{self.path}: '{stored}' holds {scale.numel()} scales; one, or one a row ({total}), can be read"
                )
            scale = scale[piece.start : piece.stop]
            return (swap_halves(scale) if piece.swapped else scale)[:, None]
        return None


def _require_float(dtype: str, name: str, path: Path) -> None:
    if dtype not in _FLOATS:
        raise CheckpointError(f"{path}: '{name}' is stored as {dtype}: quantized by another tool; give the dense model")


def _to_dense(tensor: Tensor, scale: Tensor | None) -> Tensor:
    if scale is not None:
        return (tensor.float() * scale).to(torch.bfloat16)
    # Every fp8 value is a bf16 value.
    return tensor.to(torch.bfloat16) if tensor.dtype in (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"]) else tensor


def open_source(path: str | Path, config: Mapping[str, Any] | None = None) -> Source:
    """Open a dense FLUX.1 transformer for streaming.

    Args:
        path: a diffusers pipeline folder, its transformer folder, one safetensors file, or a hub id (`org/name`).
        config: the diffusers transformer config of a single file, when names and shapes do not tell all.

    Returns:
        The source: `config`, `names()`, `shape(name)`, `tensor(name)`.

    Raises:
        CheckpointError: one line that says what is wrong: missing, pickle, damaged, not FLUX.1, quantized already.
    """
    found = resolve_transformer(path)
    return FolderSource(found) if found.is_dir() else SingleFileSource(found, config)
