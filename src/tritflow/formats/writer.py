"""Writing a ternary transformer folder a tensor at a time, so that a kill at any moment costs one module.

Every module becomes one small part file, renamed into place when it is whole: a part that exists is done, and
there is no journal that could disagree with the files. `finish` joins the parts into shards in an order that
depends on their names alone, so an interrupted and resumed job ends in the same bytes as an unbroken one.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.config import TernaryConfig
from tritflow.formats.atomic import atomic_file, disk_full, is_disk_full, write_atomic
from tritflow.formats.errors import CheckpointError
from tritflow.formats.integrity import Digest, file_metadata, start_sha256, stored_sha256, tensor_sha256
from tritflow.formats.packing import check_packed, pack
from tritflow.formats.safetensors_file import (
    SafetensorsFile,
    dtype_name,
    layout,
    raw_bytes,
    strict_json,
    write_header,
)

PARTS = ".tritflow-parts"
"""Folder inside the output that holds an unfinished job."""
WEIGHTS = "diffusion_pytorch_model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
DEFAULT_SHARD_BYTES = 2_000_000_000

_PART_KEY = "tritflow.part"


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key under which block 2 comes before block 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"([0-9]+)", name)]


@dataclass(frozen=True)
class _Stored:
    """One tensor inside a part file."""

    part: SafetensorsFile
    sha256: str
    module: str


class TransformerWriter:
    """Writes one ternary transformer folder; open it again after a kill to go on.

        writer = TransformerWriter(out, ternary, job="...")
        for name in ...:
            if name not in writer:
                writer.add_linear(name, trits, weight_scale, bias=bias)   # or add_dense(name, tensor)
        digest = writer.finish(config)

    Peak memory is one module's tensors; peak disk is twice the folder.

    Args:
        out: the folder to write; made if missing.
        ternary: storage settings; `packing` and `column_scale` decide what a linear looks like on disk.
        job: a text that is the same exactly when the same bytes are wanted (source and recipe hashes). A folder
            that holds parts of another job is refused.
        max_shard_bytes: a shard grows up to this, or to one module if that is larger.

    Attributes:
        finished: the folder already holds a whole ternary model; nothing is left to do.

    Raises:
        CheckpointError: the folder holds another job's parts, or a model that tritflow did not write.
        DiskFullError: no space left (from every method that writes).
    """

    def __init__(
        self,
        out: str | Path,
        ternary: TernaryConfig,
        job: str = "",
        max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        self.out = Path(out)
        self.ternary = ternary
        self.max_shard_bytes = max_shard_bytes
        self._parts = self.out / PARTS
        self._done: set[str] = set()
        settings = json.dumps([job, ternary.to_dict(), max_shard_bytes], sort_keys=True)
        self._job = hashlib.sha256(settings.encode()).hexdigest()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.finished = self._already_finished()
            if not self.finished:
                self._open_parts()
        except (NotADirectoryError, FileExistsError) as error:
            raise CheckpointError(f"{self.out} is a file; give a folder to write to") from error
        except OSError as error:
            if is_disk_full(error):
                raise disk_full(self.out) from error
            raise

    def _already_finished(self) -> bool:
        config = self.out / "config.json"
        if (self._parts / "job").exists() or not config.exists():
            return False
        data = strict_json(config.read_bytes(), str(config))
        quantization = data.get("quantization_config") if isinstance(data, dict) else None
        if not isinstance(quantization, dict) or quantization.get("quant_method") != "tritflow":
            raise CheckpointError(f"{self.out} already holds a model that is not ternary; choose another folder")
        shutil.rmtree(self._parts, ignore_errors=True)  # a kill in the last moment of `finish`
        return True

    def _open_parts(self) -> None:
        self._parts.mkdir(exist_ok=True)
        job = self._parts / "job"
        if job.exists():
            if job.read_text() != self._job:
                raise CheckpointError(
                    f"{self.out} holds an unfinished job with another source or other settings; "
                    f"finish that one, or delete {self._parts}"
                )
        else:
            write_atomic(job, self._job.encode())
        for path in self._parts.glob("*.safetensors"):
            try:
                part = SafetensorsFile(path)
                claimed = json.loads(part.metadata[_PART_KEY])["sha256"]
                sound = all(stored_sha256(part, name) == claimed[name] for name in part.entries)
            except (CheckpointError, KeyError, ValueError, TypeError):
                sound = False
            if sound:
                self._done.add(path.name.removesuffix(".safetensors"))
            else:  # a power cut can lose what a rename promised: make this module again
                path.unlink()

    def __contains__(self, name: object) -> bool:
        """Whether the module or tensor `name` is safely on disk already."""
        return self.finished or name in self._done

    def add_linear(
        self,
        name: str,
        trits: Tensor,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """Pack and store one ternary linear: W[n, k] = weight_scale[n] * trits[n, k] * input_scale[k].

        Args:
            name: the module's name, such as `transformer_blocks.0.attn.to_q`.
            trits: int8 [N, K]; packed where they are, which a GPU does faster than the bytes could leave it.
            weight_scale: [N], stored as bf16.
            input_scale: [K], stored as bf16; present exactly when the config's `column_scale` is set.
            bias: [N], stored as it is.

        Raises:
            CheckpointError: shapes disagree, values are not trits, or a scale is not finite.
        """
        packed = pack(trits, self.ternary.packing)
        self.add_packed(name, packed, trits.shape[1], weight_scale, input_scale, bias)

    def add_packed(
        self,
        name: str,
        packed: Tensor,
        in_features: int,
        weight_scale: Tensor,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> None:
        """`add_linear` for trits packed already in the config's packing (checked again here)."""
        check_packed(packed, in_features, self.ternary.packing)
        packed = packed.cpu()
        if (input_scale is not None) != self.ternary.column_scale:
            raise CheckpointError(
                f"{name}: input_scale must be given exactly when column_scale is set "
                f"(column_scale = {self.ternary.column_scale})"
            )
        tensors = {f"{name}.weight": packed, f"{name}.weight_scale": weight_scale.to(torch.bfloat16)}
        expected = {f"{name}.weight_scale": (packed.shape[0],)}
        if input_scale is not None:
            tensors[f"{name}.input_scale"] = input_scale.to(torch.bfloat16)
            expected[f"{name}.input_scale"] = (in_features,)
        if bias is not None:
            tensors[f"{name}.bias"] = bias
            expected[f"{name}.bias"] = (packed.shape[0],)
        for key, shape in expected.items():
            if tuple(tensors[key].shape) != shape:
                raise CheckpointError(f"{key} must have shape {list(shape)}, not {list(tensors[key].shape)}")
            if not bool(torch.isfinite(tensors[key]).all()):
                raise CheckpointError(f"{key} is not finite: this layer's source or calibration is broken")
        self._write_part(name, tensors, {name: in_features})

    def add_dense(self, name: str, tensor: Tensor) -> None:
        """Store a tensor as it is. `name` is the tensor's full name, such as `x_embedder.weight`."""
        self._write_part(name, {name: tensor}, {})

    def _write_part(self, key: str, tensors: dict[str, Tensor], linears: dict[str, int]) -> None:
        if self.finished:
            raise CheckpointError(f"{self.out} is finished; nothing can be added")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", key):
            raise CheckpointError(f"'{key[:200]}' is no module name")
        entries = layout({name: (dtype_name(t), tuple(t.shape)) for name, t in tensors.items()})
        note = {"sha256": {n: tensor_sha256(n, t) for n, t in tensors.items()}, "linears": linears}
        with atomic_file(self._parts / f"{key}.safetensors", sync=False) as file:
            write_header(file, entries, {_PART_KEY: json.dumps(note, sort_keys=True)})
            for name in entries:
                file.write(raw_bytes(tensors[name]))
        self._done.add(key)

    def finish(self, config: Mapping[str, Any]) -> str:
        """Join the parts into shards, write the index and, last of all, config.json. Returns the digest.

        Args:
            config: the transformer's config as diffusers writes it, without `quantization_config`.

        Raises:
            CheckpointError: nothing was added, a tensor was added twice, or a part was damaged meanwhile.
        """
        if self.finished:
            return str(json.loads((self.out / "config.json").read_text())["quantization_config"]["digest"])
        stored, linears = self._inventory()
        digest = Digest()
        for name, item in stored.items():
            digest.add_sha256(name, item.sha256)
        ternary = {"quant_method": "tritflow", **self.ternary.to_dict(), "digest": digest.hexdigest()}
        config = {**config, "quantization_config": ternary}
        shards = self._assign(stored)
        for file_name, names in shards.items():
            self._write_shard(self.out / file_name, {n: stored[n] for n in names}, linears, config)
        kept = set(shards)
        if len(shards) > 1:
            kept.add(INDEX)
            write_atomic(self.out / INDEX, _index(shards, stored))
        for path in self.out.glob(f"{WEIGHTS}*"):
            if path.name not in kept:  # of an earlier model in this folder
                path.unlink()
        write_atomic(self.out / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())
        # Once `job` is gone the parts no longer count, so a kill inside rmtree does no harm.
        (self._parts / "job").unlink()
        shutil.rmtree(self._parts, ignore_errors=True)
        for path in self.out.glob(f".{WEIGHTS}*.tmp"):
            path.unlink()
        self.finished = True
        return digest.hexdigest()

    def _inventory(self) -> tuple[dict[str, _Stored], dict[str, int]]:
        stored: dict[str, _Stored] = {}
        linears: dict[str, int] = {}
        for key in sorted(self._done, key=natural_key):
            part = SafetensorsFile(self._parts / f"{key}.safetensors")
            note = json.loads(part.metadata[_PART_KEY])
            linears.update(note["linears"])
            for name in sorted(part.entries, key=natural_key):
                if name in stored:
                    raise CheckpointError(f"tensor '{name}' was added by '{stored[name].module}' and by '{key}'")
                stored[name] = _Stored(part, note["sha256"][name], key)
        if not stored:
            raise CheckpointError(f"{self.out}: nothing was added, so there is no model to finish")
        return stored, linears

    def _assign(self, stored: Mapping[str, _Stored]) -> dict[str, list[str]]:
        modules: dict[str, list[str]] = {}  # a module's tensors stay in one shard
        for name, item in stored.items():
            modules.setdefault(item.module, []).append(name)
        groups: list[list[str]] = [[]]
        size = 0
        for names in modules.values():
            nbytes = sum(stored[name].part.entries[name].nbytes for name in names)
            if groups[-1] and size + nbytes > self.max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1] += names
            size += nbytes
        if len(groups) == 1:
            return {f"{WEIGHTS}.safetensors": groups[0]}
        total = len(groups)
        return {f"{WEIGHTS}-{i:05d}-of-{total:05d}.safetensors": g for i, g in enumerate(groups, 1)}

    @staticmethod
    def _write_shard(
        path: Path, stored: Mapping[str, _Stored], linears: Mapping[str, int], config: Mapping[str, Any]
    ) -> None:
        entries = layout({n: (s.part.entries[n].dtype, s.part.entries[n].shape) for n, s in stored.items()})
        own = {name: k for name, k in linears.items() if f"{name}.weight" in stored}
        metadata = file_metadata({n: s.sha256 for n, s in stored.items()}, own, config)
        with atomic_file(path) as file:
            write_header(file, entries, metadata)
            for name in entries:
                for chunk in _checked_chunks(stored[name], name):
                    file.write(chunk)


def _checked_chunks(item: _Stored, name: str) -> Iterator[memoryview]:
    entry = item.part.entries[name]
    hasher = start_sha256(name, entry.dtype, entry.shape)
    for chunk in item.part.chunks(name):
        hasher.update(chunk)
        yield chunk
    if hasher.hexdigest() != item.sha256:
        raise CheckpointError(f"{item.part.path} was damaged while it lay on the disk; delete it and run again")


def _index(shards: Mapping[str, list[str]], stored: Mapping[str, _Stored]) -> bytes:
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(s.part.entries[n].nbytes for n, s in stored.items())
    return (json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n").encode()


def write_folder(
    out: str | Path,
    config: Mapping[str, Any],
    ternary: TernaryConfig,
    linears: Mapping[str, Mapping[str, Tensor | None]],
    dense: Mapping[str, Tensor],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> str:
    """Write a model that is in memory whole. Returns the digest.

    Args:
        out: the folder; an unfinished job in it is refused unless it is this same model.
        config: the transformer's config without `quantization_config`.
        ternary: storage settings.
        linears: module name -> `trits`, `weight_scale` and optionally `input_scale`, `bias`
            (the arguments of `TransformerWriter.add_linear`).
        dense: every other tensor, by name.
        max_shard_bytes: as in `TransformerWriter`.
    """
    writer = TransformerWriter(out, ternary, "in memory", max_shard_bytes)
    if writer.finished:
        raise CheckpointError(f"{out} already holds a ternary model; choose another folder or delete it")
    for name, arguments in linears.items():
        writer.add_linear(name, **arguments)  # type: ignore[arg-type]
    for name, tensor in dense.items():
        writer.add_dense(name, tensor)
    return writer.finish(config)
