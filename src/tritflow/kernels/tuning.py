"""Which backend and tiles are fastest for a product on this GPU: measured once, kept in a file, looked up from then on.

Files are `tuned/<gpu>.json` inside the package and in the user's cache folder (`$TRITFLOW_CACHE`, by default
`~/.cache/tritflow`), whose entries win. A GPU without a file runs the kernels' fixed choices; nothing is ever measured
behind the user's back, since results of fp8 and 16-bit products may differ in their last bits from one choice to
the next. `tune` measures; `tritflow bench tune` is its command.

    {"schema": 1, "device": ..., "versions": {...}, "entries":
        {"w2a8 int8 4608x9216x3072": {"backend": "triton", "config": {"BLOCK_M": 128, ...}, "microseconds": 201.3}}}
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch

from tritflow.formats.atomic import write_atomic

SCHEMA = 1
W2A16 = "w2a16"
_NAMES = {torch.int8: "w2a8 int8", torch.float8_e4m3fn: "w2a8 float8_e4m3fn"}
_ATTENTION = {"attention": 3, "normed_attention": 13}  # where their arguments have the dtype
TUNED = ("w2a8_matmul", "w2a8_linear", "w2a16_linear", *_ATTENTION)
"""Operations whose backend may be tuned."""
FOLDER = Path(__file__).parent / "tuned"

_NEAR = 2.0  # a size that was measured serves sizes up to this factor away


class TuningError(ValueError):
    """A file of tuned choices is broken or of a newer schema. The message names it and the way out."""


@dataclass(frozen=True)
class Choice:
    """What to run for one product.

    Attributes:
        backend: a name of `backends.NAMES`.
        config: tile sizes and launch options of that backend; empty for its own.
        microseconds: median when it was measured.
    """

    backend: str
    config: dict[str, Any] = field(default_factory=dict)
    microseconds: float = 0.0

    @property
    def label(self) -> str:
        """The choice in a word or two, for tables."""
        return " ".join([self.backend, *(f"{key}={value}" for key, value in self.config.items())])


def w2a8(dtype: torch.dtype) -> str:
    """Name of a W2A8 product in the files, by the dtype of its activations."""
    return _NAMES[dtype]


def adaln(dtype: str | None) -> str:
    """Name of the layer norm with modulation in the files, by the dtype it quantizes to; n and k are its features."""
    return f"adaln {dtype or 'plain'}"


def attention(dtype: str) -> str:
    """Name of 8-bit attention in the files; m is its tokens, n its heads of all pictures, k features of a head."""
    return f"attention {dtype}"


def low_rank_down(dtype: torch.dtype) -> str:
    """Name of a low-rank update's first factor in the files, by the dtype of its rows; n is its columns."""
    return f"low rank down {str(dtype).removeprefix('torch.')}"


def slug(device: str) -> str:
    """File name of a GPU."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def cache_folder() -> Path:
    """Where `tune` keeps its findings by default."""
    root = os.environ.get("TRITFLOW_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "tritflow") / "tuned"


def read(path: Path) -> dict[str, Choice]:
    """Entries of one file; empty if there is none.

    Raises:
        TuningError: the file is no such file.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TuningError(f"{path} is not readable ({error}); delete it and run `tritflow bench tune`") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA or not isinstance(data.get("entries"), dict):
        raise TuningError(f"{path} is no file of tuned choices of schema {SCHEMA}; delete it and tune again")
    try:
        return {str(name): Choice(**entry) for name, entry in data["entries"].items()}
    except TypeError as error:
        raise TuningError(f"{path} holds an entry that is no choice ({error}); delete it and tune again") from None


def write(path: Path, device: str, versions: Mapping[str, str], entries: Mapping[str, Choice]) -> None:
    """Write a file, keeping what it has for other sizes."""
    merged = read(path) | dict(entries)
    data = {
        "schema": SCHEMA,
        "device": device,
        "versions": dict(versions),
        "entries": {name: asdict(merged[name]) for name in sorted(merged)},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
    forget()


def forget() -> None:
    """Read the files again at the next look-up."""
    _entries.cache_clear()
    _lookup.cache_clear()


def entry(name: str, m: int, n: int, k: int) -> str:
    """Key of a product in the files."""
    return f"{name} {m}x{n}x{k}"


@cache
def _entries(device: str) -> dict[tuple[str, int, int], dict[int, Choice]]:
    """(name, n, k) -> m -> choice."""
    file = f"{slug(device)}.json"
    found: dict[tuple[str, int, int], dict[int, Choice]] = {}
    for text, choice in (read(FOLDER / file) | read(cache_folder() / file)).items():
        name, _, sizes = text.rpartition(" ")
        try:
            m, n, k = map(int, sizes.split("x"))
        except ValueError:
            raise TuningError(f"{file} holds '{text}', which names no product; delete it and tune again") from None
        found.setdefault((name, n, k), {})[m] = choice
    return found


@lru_cache(maxsize=4096)
def _lookup(device: str, name: str, m: int, n: int, k: int) -> Choice | None:
    known = _entries(device).get((name, n, k))
    if not known or m < 1:
        return None
    nearest = min(known, key=lambda other: (max(m / other, other / m), other))
    return known[nearest] if max(m / nearest, nearest / m) <= _NEAR else None


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def lookup(device: torch.device, name: str, m: int, n: int, k: int) -> Choice | None:
    """The tuned choice for a product of [m, k] activations with [n, k] trits, or None.

    Args:
        device: where it will run.
        name: `w2a8(dtype)` or `W2A16`.
        m: tokens; the nearest size that was measured counts, up to a factor of two.
        n: out_features.
        k: in_features.
    """
    if device.type != "cuda":
        return None
    return _lookup(_device_name(device.index), name, m, n, k)


def preferred(op: str, device: torch.device, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The tuned backend for an operation's arguments, as a tuple of none or one."""
    if op in _ATTENTION:
        q = args[0]
        context = args[7] if op == "normed_attention" else None
        tokens = q.shape[1] + (0 if context is None else context.shape[1])
        sizes = (tokens, q.shape[0] * q.shape[2], q.shape[3])
        found = lookup(device, attention(args[_ATTENTION[op]]), *sizes)
        return () if found is None else (found.backend,)
    if op == "w2a8_matmul":
        q, weight = args[0], args[2]
        name = _NAMES[q.dtype]
    else:
        q, weight = args[0], args[1]
        name = W2A16 if op == "w2a16_linear" else f"w2a8 {args[5]}"
    k = q.shape[-1]
    choice = lookup(device, name, q.numel() // k, weight.shape[0], k)
    if choice is None or (choice.backend == "scratch" and op == "w2a8_matmul" and args[8:9] not in ((), (None,))):
        return ()  # a library's product adds a low-rank update in a pass of its own, which costs more than it gains
    return (choice.backend,)
