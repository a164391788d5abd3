"""Which model drew: a hash of its folders that tells any two checkpoints apart, at little cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tritflow.evaluation.api import EvaluationError
from tritflow.formats.repacking import LATENTS

_KINDS = (".safetensors", ".json", ".txt", ".model")
# Files up to this size are hashed whole; of larger ones the first and last piece and many between them.
_WHOLE = 64 << 20
_PIECE = 64 << 10
_PIECES = 256
# Notes of the run that made a folder, and what a further run would start from, say nothing about its pictures.
_IGNORED = {"meta.json", "README.md", "prompts.jsonl", LATENTS}


def fingerprint(folders: Iterable[str | Path]) -> str:
    """16 hex digits over the weights and configurations in `folders`, in the order given.

    Files over 64 MiB are sampled (256 evenly spaced pieces of 64 KiB, the header and the end among them): training
    or quantizing moves every tensor, so that two models of equal size differ in nearly every piece. Names relative to
    their folder count, places on the disk do not: neither the folder's own nor the one that a config.json was once
    loaded from.

    Raises `EvaluationError` for a folder without weights.
    """
    total = hashlib.sha256()
    for folder in map(Path, folders):
        files = sorted(
            p
            for p in folder.rglob("*")
            if p.is_file()
            and p.suffix in _KINDS
            and p.name not in _IGNORED
            and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        )
        if not any(p.suffix == ".safetensors" for p in files):
            raise EvaluationError(f"{folder}: holds no safetensors weights to tell this model by")
        for path in files:
            name, text = path.relative_to(folder).as_posix(), _without_origin(path)
            size = path.stat().st_size if text is None else len(text)
            total.update(f"{name}\0{size}\0".encode())
            total.update(_content(path, size) if text is None else hashlib.sha256(text).digest())
    return total.hexdigest()[:16]


def _without_origin(path: Path) -> bytes | None:
    """A config.json without `_name_or_path`, as diffusers would write it; None for what has no such line."""
    if path.name != "config.json":
        return None
    try:
        config = json.loads(path.read_bytes())
        del config["_name_or_path"]
    except (ValueError, KeyError, TypeError):
        return None
    return (json.dumps(config, indent=2) + "\n").encode()


def _content(path: Path, size: int) -> bytes:
    with path.open("rb") as f:
        if size <= _WHOLE:
            return hashlib.file_digest(f, "sha256").digest()
        found = hashlib.sha256()
        for i in range(_PIECES):
            f.seek((size - _PIECE) * i // (_PIECES - 1))
            found.update(f.read(_PIECE))
        return found.digest()
