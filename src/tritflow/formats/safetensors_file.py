"""The safetensors container, read and written a tensor at a time.

The reference library maps whole files into memory and reports damage as it finds it. This reader fetches exact
byte ranges instead (so that peak memory is one tensor), and checks the whole header first, so that a damaged
file is one clear line. Layout: 8 bytes little-endian header length, JSON header, data
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from tritflow.formats.errors import CheckpointError
from tritflow.formats.staging import staging

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000
"""Bytes; the limit of the reference library, so that a damaged length cannot ask for all memory."""
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype by safetensors name, shape, and byte range within the data section."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


def strict_json(text: bytes, what: str) -> Any:
    """Parse UTF-8 JSON; duplicate keys, NaN and over-deep nesting are damage, not data.

    Raises:
        CheckpointError: with `what` (the file's name) and the reason.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key occurs twice")
        for key in result:
            key.encode()  # a lone surrogate is no name
        return result

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: not readable as JSON ({error}): the file is damaged") from error


def refuse_pickle(path: Path, start: bytes) -> None:
    """Raise `CheckpointError` when a file's name or first bytes say that it is a pickle or an archive of one."""
    if path.suffix.lower() in {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}:
        raise CheckpointError(
            f"{path} is a pickle by its name; loading one can run any code, so tritflow reads safetensors only. "
            "Convert it with the tools of whoever made it"
        )
    # A safetensors header of just the right length starts with the same bytes; what follows tells them apart.
    is_header = start[4:8] == b"\0\0\0\0" and start[8:9] == b"{"
    if not is_header and (start[:2] == b"PK" or (start[:1] == b"\x80" and start[1:2] in (b"\2", b"\3", b"\4", b"\5"))):
        raise CheckpointError(
            f"{path} holds a pickle (or a zip archive of one) under a safetensors name; it is refused unread"
        )
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull`")


class SafetensorsFile:
    """A safetensors file with its header checked and its data on disk.

    Args:
        path: the file.

    Attributes:
        entries: tensor name -> `Entry`, in file order.
        metadata: the header's `__metadata__`, str -> str.

    Raises:
        CheckpointError: missing, truncated, a pickle, or a header that does not describe the data exactly.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"{self.path} does not exist")
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            start = file.read(64)
            refuse_pickle(self.path, start)
            if len(start) < 8:
                raise CheckpointError(f"{self.path}: truncated ({size} bytes; not even a header)")
            length = int.from_bytes(start[:8], "little")
            if length > min(MAX_HEADER, size - 8):
                raise CheckpointError(
                    f"{self.path}: the header claims {length} bytes but the file has {size}: "
                    "truncated, damaged, or not safetensors"
                )
            file.seek(8)
            header = strict_json(file.read(length), f"{self.path}: header")
        self._data_start = 8 + length
        self.metadata, self.entries = self._parse(header, size - self._data_start)

    def _parse(self, header: Any, data_size: int) -> tuple[dict[str, str], dict[str, Entry]]:
        if not isinstance(header, dict):
            raise self._damaged("the header is not an object")
        metadata = header.pop("__metadata__", {})
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise self._damaged("__metadata__ is not text")
        entries = {name: self._entry(name, value) for name, value in header.items()}
        entries = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
        position = 0
        for name, entry in entries.items():
            if entry.begin != position:
                raise self._damaged(f"'{name}' starts at byte {entry.begin}, expected {position}")
            position = entry.end
        if position != data_size:
            raise self._damaged(f"{data_size} bytes of data where the header promises {position}")
        return metadata, entries

    def _entry(self, name: str, value: Any) -> Entry:
        if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
            raise self._damaged(f"'{name}' is not described by dtype, shape and data_offsets")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise self._damaged(f"'{name}' has the unknown dtype {str(dtype)[:40]!r}")
        if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 16:
            raise self._damaged(f"'{name}' has an impossible shape or data_offsets")
        count = math.prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != count:
            raise self._damaged(
                f"'{name}' of shape {shape} needs {count} bytes, the header gives {offsets[1] - offsets[0]}"
            )
        return Entry(dtype, tuple(shape), offsets[0], offsets[1])

    def _damaged(self, why: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {why[:300]}: the file is damaged or truncated")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """Raises `CheckpointError` when there is no such tensor."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        return self.entries[name]

    def tensor(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor, or `rows` start:stop of its first dimension, into fresh memory on `device` (no map).

        Raises:
            CheckpointError: no such tensor, or the file shrank since it was opened.
        """
        entry = self.entry(name)
        begin, shape = entry.begin, entry.shape
        if rows is not None:
            first, stop, _ = rows.indices(shape[0])
            row_bytes = entry.nbytes // shape[0] if shape[0] else 0
            begin, shape = begin + first * row_bytes, (max(0, stop - first), *shape[1:])
        dtype = DTYPES[entry.dtype]
        data = torch.empty(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=straight(device))
        if data.numel():
            with open(self.path, "rb", buffering=0) as file:
                file.seek(self._data_start + begin)
                if data.is_cuda:
                    staging(data.device).fill(data, functools.partial(self._fill, file))
                else:
                    self._fill(file, data.numpy().data)
        return data.view(dtype).reshape(shape).to(device)

    def _fill(self, file: Any, view: memoryview) -> None:
        while view:
            count = file.readinto(view[: 1 << 30])
            if not count:
                raise CheckpointError(f"{self.path} became shorter while it was read")
            view = view[count:]

    def chunks(self, name: str) -> Iterator[memoryview]:
        """The raw bytes of one tensor, at most 8 MiB at a time; each chunk is overwritten by the next."""
        entry = self.entry(name)
        buffer = memoryview(bytearray(min(_CHUNK, entry.nbytes)))
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._data_start + entry.begin)
            left = entry.nbytes
            while left:
                part = buffer[: min(left, len(buffer))]
                self._fill(file, part)
                yield part
                left -= len(part)


def straight(device: torch.device | str) -> torch.device:
    """Where bytes of a file can be read to on their way to `device`: a CUDA device itself, else memory."""
    device = torch.device(device)
    return device if device.type == "cuda" else torch.device("cpu")


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and 0 <= v < 1 << 60 for v in value)


def layout(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Entry]:
    """Place tensors in a data section: wide dtypes first, so that every offset is aligned, else in the order given.

    Args:
        tensors: name -> (dtype by safetensors name, shape).
    """
    entries, position = {}, 0
    for name in sorted(tensors, key=lambda n: -DTYPES[tensors[n][0]].itemsize):
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        entries[name] = Entry(dtype, tuple(shape), position, end)
        position = end
    return entries


class Writable(Protocol):
    """What takes bytes."""

    def write(self, data: bytes | memoryview, /) -> Any: ...


def write_header(file: Writable, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Write length and JSON header, padded with spaces to a multiple of 8. The same input gives the same bytes."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for name, entry in entries.items():
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [entry.begin, entry.end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)


def raw_bytes(tensor: Tensor) -> memoryview:
    """A tensor's little-endian bytes in row-major order: no copy when it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def dtype_name(tensor: Tensor) -> str:
    """The safetensors name of a tensor's dtype. Raises `CheckpointError` for dtypes the container lacks."""
    if tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(f"safetensors cannot store {tensor.dtype}")
    return DTYPE_NAMES[tensor.dtype]
