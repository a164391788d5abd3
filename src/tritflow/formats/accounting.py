"""Exact sizes: bytes a layer, bits a weight, trits counted, and what a config will take on disk.

Everything is measured from headers and bytes; nothing is called 1.58 bits here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from tritflow.config import Packing, TernaryConfig
from tritflow.formats.architecture import Shape
from tritflow.formats.checkpoint import TernaryFolder, verify_folder
from tritflow.formats.folder import TensorFolder, read_json_object
from tritflow.formats.locate import resolve
from tritflow.formats.packing import packed_width, unpack
from tritflow.formats.safetensors_file import DTYPES, Entry, SafetensorsFile
from tritflow.formats.writer import natural_key

_SLAB_ROWS = 1024


@dataclass(frozen=True)
class Layer:
    """One module of a checkpoint, with all its tensors.

    Attributes:
        name: the module.
        kind: `ternary`, or the dtype of its largest tensor in lower case (`bf16`).
        shape: logical shape of its weight (or largest tensor).
        parameters: logical numbers in it: weights and biases, not scales.
        nbytes: bytes of all its tensors on disk, scales included.
        trits: how many of its weights are -1, 0 and +1 (ternary layers only, when counted).
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    parameters: int
    nbytes: int
    trits: tuple[int, int, int] | None = None

    @property
    def bits(self) -> float:
        """Bits on disk for one logical parameter."""
        return 8 * self.nbytes / max(1, self.parameters)


def ternary_bytes(shapes: Iterable[tuple[int, ...]], packing: Packing, column_scale: bool) -> tuple[int, int]:
    """Weights in ternary linears of shapes (N, K), and the bytes they take with their bf16 scales, biases left out."""
    weights = size = 0
    for rows, columns in shapes:
        weights += rows * columns
        size += rows * packed_width(columns, packing) + 2 * rows + 2 * columns * column_scale
    return weights, size


@dataclass(frozen=True)
class Component:
    """One part of a model (the transformer, a text encoder, ...) in layers.

    Attributes:
        name: its folder's or file's name.
        path: where it lies.
        layers: its modules, in file order by natural name.
        file_bytes: bytes of the folder's files as they lie on disk, headers and configs included.
        settings: the `TernaryConfig` of a ternary transformer as JSON, else empty.
        digest: of a ternary transformer, else empty.
    """

    name: str
    path: str
    layers: list[Layer]
    file_bytes: int
    settings: dict[str, Any] = field(default_factory=dict)
    digest: str = ""

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def ternary(self) -> list[Layer]:
        return [layer for layer in self.layers if layer.kind == "ternary"]

    @property
    def bf16_bytes(self) -> int:
        """What the same parameters take in bf16."""
        return 2 * self.parameters

    def summary(self) -> dict[str, Any]:
        """Totals as plain JSON: sizes in bytes, ratio to bf16, bits a weight, trits as shares of one."""
        ternary = self.ternary
        tensor_bytes = sum(layer.nbytes for layer in self.layers)
        totals: dict[str, Any] = {
            "name": self.name,
            "path": self.path,
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "tensor_bytes": tensor_bytes,
            "bf16_bytes": self.bf16_bytes,
            "ratio_to_bf16": self.bf16_bytes / max(1, self.file_bytes),
            "bits_per_parameter": 8 * tensor_bytes / max(1, self.parameters),
            "ternary_layers": len(ternary),
            "settings": self.settings,
            "digest": self.digest,
        }
        if ternary:
            weights = sum(prod(layer.shape) for layer in ternary)
            width = str(self.settings.get("packing", "2bit"))
            packed = sum(layer.shape[0] * packed_width(layer.shape[1], _packing(width)) for layer in ternary)
            totals["ternary_weights"] = weights
            totals["bits_per_ternary_weight"] = 8 * packed / weights
            counts = [layer.trits for layer in ternary if layer.trits]
            if len(counts) == len(ternary):
                sums = [sum(c[i] for c in counts) for i in range(3)]
                totals["trits"] = {k: s / weights for k, s in zip(("-1", "0", "+1"), sums, strict=True)}
        return totals

    def to_dict(self) -> dict[str, Any]:
        """`summary` with every layer."""
        layers = [{**asdict(layer), "bits_per_parameter": layer.bits} for layer in self.layers]
        return {**self.summary(), "layers": layers}


def _packing(name: str) -> Packing:
    return "base3" if name == "base3" else "2bit"


def account(path: str | Path, read_data: bool = True) -> list[Component]:
    """Take stock of a model on disk.

    Args:
        path: what `locate.resolve` takes: a ternary or dense transformer folder, a pipeline folder, a single file.
        read_data: verify ternary folders byte by byte, and count their -1, 0 and +1; else headers alone are read.

    Returns:
        The transformer first, then the pipeline's other parts that hold safetensors files.

    Raises:
        CheckpointError: damaged or missing files.
    """
    location = resolve(path)
    whole = location.pipeline is not None and Path(path).resolve() != location.transformer.resolve()
    components = [_component(location.transformer, read_data)]
    if whole and location.pipeline:
        for folder in sorted(p for p in location.pipeline.iterdir() if p.is_dir() and p != location.transformer):
            if any(folder.glob("*.safetensors")):
                components.append(_component(folder, read_data))
    return components


def _component(path: Path, read_data: bool) -> Component:
    if path.is_file():
        file = SafetensorsFile(path)
        return Component(path.name, str(path), _dense_layers(file.entries), path.stat().st_size)
    file_bytes = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    config = read_json_object(path / "config.json") if (path / "config.json").exists() else {}
    quantization = config.get("quantization_config")
    if isinstance(quantization, dict) and quantization.get("quant_method") == "tritflow":
        folder = verify_folder(path) if read_data else TernaryFolder(path)
        layers = _ternary_layers(folder, read_data)
        return Component(path.name, str(path), layers, file_bytes, folder.ternary.to_dict(), folder.digest)
    dense = TensorFolder(path)
    return Component(path.name, str(path), _dense_layers({n: dense.entry(n) for n in dense.names()}), file_bytes)


def _dense_layers(entries: Mapping[str, Entry]) -> list[Layer]:
    modules: dict[str, list[Entry]] = defaultdict(list)
    for name, entry in entries.items():
        modules[name.rpartition(".")[0] or name].append(entry)
    layers = []
    for name, members in sorted(modules.items(), key=lambda item: natural_key(item[0])):
        largest = max(members, key=lambda e: prod(e.shape))
        parameters = sum(prod(e.shape) for e in members)
        nbytes = sum(e.nbytes for e in members)
        layers.append(Layer(name, largest.dtype.lower(), largest.shape, parameters, nbytes))
    return layers


def _ternary_layers(folder: TernaryFolder, count_trits: bool) -> list[Layer]:
    layers = _dense_layers({n: folder.entry(n) for n in folder.dense_names()})
    for name, in_features in folder.linears.items():
        parts = [f"{name}.{p}" for p in ("weight", "weight_scale", "input_scale", "bias") if f"{name}.{p}" in folder]
        rows = folder.entry(f"{name}.weight").shape[0]
        parameters = rows * in_features + (rows if f"{name}.bias" in folder else 0)
        nbytes = sum(folder.entry(p).nbytes for p in parts)
        trits = _count(folder, name) if count_trits else None
        layers.append(Layer(name, "ternary", (rows, in_features), parameters, nbytes, trits))
    return sorted(layers, key=lambda layer: natural_key(layer.name))


def _count(folder: TernaryFolder, name: str) -> tuple[int, int, int]:
    in_features = folder.linears[name]
    packed = folder.tensor(f"{name}.weight")
    counts = torch.zeros(3, dtype=torch.int64)
    for start in range(0, packed.shape[0], _SLAB_ROWS):
        trits = unpack(packed[start : start + _SLAB_ROWS], in_features, folder.ternary.packing)
        positive, negative = int((trits == 1).sum()), int((trits == -1).sum())
        counts += torch.tensor([negative, trits.numel() - positive - negative, positive])
    return int(counts[0]), int(counts[1]), int(counts[2])


@dataclass(frozen=True)
class StorageEstimate:
    """Bytes of the tensors of a ternary transformer folder, computed from shapes alone.

    Attributes:
        packed: trits.
        scales: row and column scales.
        dense: biases, norms and everything that is not ternary, in the given dtype.
        bf16: the whole model in bf16.
        linears: how many linears are ternary.
    """

    packed: int
    scales: int
    dense: int
    bf16: int
    linears: int

    @property
    def total(self) -> int:
        """Without file headers (checksums take about 200 bytes a tensor)."""
        return self.packed + self.scales + self.dense


def storage_estimate(
    shapes: Mapping[str, Shape],
    packing: Packing = "2bit",
    config: TernaryConfig | None = None,
    dense_dtype: str = "BF16",
) -> StorageEstimate:
    """What a transformer will take on disk once it is ternary.

    Args:
        shapes: tensor name -> logical shape, from `architecture.shapes_of(config)` or `Source.shapes()`.
        packing: how trits lie on disk.
        config: targets and column scales (default: all block linears, row scales only).
        dense_dtype: of everything that stays dense, as safetensors spells it.
    """
    config = config or TernaryConfig()
    itemsize = DTYPES[dense_dtype].itemsize
    packed = scales = dense = linears = 0
    for name, shape in shapes.items():
        module, _, part = name.rpartition(".")
        if part == "weight" and len(shape) == 2 and config.matches(module):
            linears += 1
            packed += shape[0] * packed_width(shape[1], packing)
            scales += 2 * shape[0] + (2 * shape[1] if config.column_scale else 0)
        else:
            dense += prod(shape) * itemsize
    total = 2 * sum(prod(s) for s in shapes.values())
    return StorageEstimate(packed, scales, dense, total, linears)
