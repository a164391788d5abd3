"""A folder of one model's pictures of one suite: what lies in it, and reading it back.

    meta.json        what every picture shares: suite, model, settings, seeds, batch size, device, versions
    prompts.jsonl    the suite's prompts in order (ids, tags, texts, metadata)
    manifest.jsonl   one line a picture: where it lies, prompt, seed, model, settings, size in bytes, SHA-256
    images/...       PNG files in the suite's own layout

`drawing.py` fills such a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tritflow.evaluation.api import EvaluationError, Judgement, PromptRecord, Task, prompts_hash
from tritflow.results import canonical

META, PROMPTS, MANIFEST = "meta.json", "prompts.jsonl", "manifest.jsonl"
KIND = "tritflow.images"
VERSION = 1

# What a line has to hold, by kind of file.
_PROMPT = {"id": str, "tag": str, "text": str, "metadata": dict}
_VERDICT = {"prompt_id": str, "tag": str, "sample": int, "seed": int, "score": (int, float), "reason": str}
_MARKED = {"marked": (int, float)}
_ENTRY = {
    "path": str,
    "prompt_id": str,
    "prompt": str,
    "tag": str,
    "sample": int,
    "seed": int,
    "model": str,
    "model_hash": str,
    "height": int,
    "width": int,
    "bytes": int,
    "sha256": str,
}
_META = {"suite": dict, "model": dict, "settings": dict, "prompts_hash": str, "samples": int, "base_seed": int}
_KINDS = {str: "text", int: "a whole number", dict: "an object", (int, float): "a number"}


class ImageSetError(EvaluationError):
    """A folder's pictures are missing, damaged, or not those that were asked for. Names folder and picture."""


@dataclass(frozen=True)
class ModelId:
    """Which model drew: the name people call it by, and a hash of its files."""

    name: str
    hash: str


@dataclass(frozen=True)
class Settings:
    """How pictures are drawn; equal settings and seeds make two models' pictures comparable.

    `height`, `width` in pixels; `extra` holds anything else that changes a picture (mode, dtype, text tokens).
    """

    height: int
    width: int
    num_inference_steps: int
    guidance_scale: float
    extra: dict[str, Any] = field(default_factory=dict)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSON-lines file, none where there is no file; a last line cut off by a kill is left out."""
    found: list[dict[str, Any]] = []
    try:
        data = path.read_bytes()
    except FileNotFoundError:  # not asked before: another rank may remove its part between the two
        return found
    for line in data.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            break
        try:
            found.append(json.loads(line))
        except (UnicodeDecodeError, json.JSONDecodeError):
            raise ImageSetError(f"{path}: line {len(found) + 1} is not JSON; delete that line") from None
        if not isinstance(found[-1], dict):
            raise ImageSetError(f"{path}: line {len(found)} is no JSON object; delete that line")
    return found


def demand(row: Mapping[str, Any], needs: Mapping[str, Any], where: str) -> None:
    """Raises `ImageSetError`, `where` first, unless a row has every key of `needs` with a value of its type(s)."""
    for key, kind in needs.items():
        value = row.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            fault = f"has '{key}' {json.dumps(value)}" if key in row else f"has no '{key}'"
            seeds = "; what has no seed does not compare" if key == "seed" else ""
            raise ImageSetError(f"{where} {fault}, where {_KINDS[kind]} belongs{seeds}; run the same evaluation again")


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The pictures that a manifest, or a rank's part of one, lists.

    Raises `ImageSetError` for a line that does not say what a picture is: place, prompt, seed, model, size, hash.
    """
    entries = read_lines(path)
    for number, entry in enumerate(entries, 1):
        demand(entry, _ENTRY, f"{path}: line {number} ({entry.get('path', 'a picture without a path')})")
    return entries


def verdict_of(row: Mapping[str, Any], where: str) -> Judgement:
    """The verdict that a line holds. Raises `ImageSetError`, `where` first, when it lacks one of a verdict's parts."""
    demand(row, _VERDICT, where)
    if row.get("marked") is not None:
        demand(row, _MARKED, where)
    return Judgement(**{key: row[key] for key in _VERDICT}, marked=row.get("marked"))


def read_verdicts(path: Path) -> list[Judgement]:
    """Verdicts as `evaluate` leaves them in `NAME.scores.jsonl`. Raises `ImageSetError` for a line that holds none."""
    return [verdict_of(row, f"{path}: line {i}") for i, row in enumerate(read_lines(path), 1)]


def read_records(path: Path) -> list[PromptRecord]:
    """The prompts of a picture folder. Raises `ImageSetError` for a line that is no prompt."""
    rows = read_lines(path)
    for number, row in enumerate(rows, 1):
        demand(row, _PROMPT, f"{path}: line {number}")
    return [PromptRecord(**{key: row[key] for key in _PROMPT}) for row in rows]


def cut_half_line(path: Path) -> None:
    """Remove what a kill left of a last line, so that the next one starts on its own."""
    with contextlib.suppress(FileNotFoundError), open(path, "r+b") as f:
        data = f.read()
        f.truncate(data.rfind(b"\n") + 1)


class ImageSet:
    """A complete, checked folder of pictures. `open` reads one, `draw_images` makes one."""

    def __init__(
        self,
        folder: Path,
        meta: dict[str, Any],
        records: list[PromptRecord],
        entries: list[dict[str, Any]],
    ) -> None:
        self.folder, self.meta, self.records, self.entries = folder, meta, records, entries

    @classmethod
    def open(cls, folder: str | Path, task: Task | None = None) -> ImageSet:
        """Read a finished folder.

        Raises `ImageSetError` when it is no picture folder, belongs to another suite than `task`, misses
        pictures, holds pictures of two models, has a picture without a seed, or has a half-written one (by its
        size here; `pixels` also checks the SHA-256).
        """
        folder = Path(folder)
        meta = read_meta(folder)
        suite = meta["suite"]["name"]
        if task is not None and suite != task.name:
            raise ImageSetError(f"{folder}: holds pictures of the suite '{suite}', not of '{task.name}'")
        version = meta["suite"].get("version")
        if task is not None and version != task.version:
            raise ImageSetError(
                f"{folder}: holds pictures of version {version} of '{suite}', here it is version {task.version}; "
                "draw into a new folder"
            )
        records = read_records(folder / PROMPTS)
        if prompts_hash(records) != meta["prompts_hash"]:
            raise ImageSetError(f"{folder / PROMPTS}: was changed after drawing began; draw into a new folder")
        entries = read_manifest(folder / MANIFEST)
        total = len(records) * meta["samples"]
        model, names = asdict(ModelId(**meta["model"])), {r.id for r in records}
        seen = set()
        root = folder.resolve()
        inside: dict[Path, bool] = {}  # by parent folder: resolving each picture's path costs more than all the rest
        for entry in entries:
            where = f"{folder / entry['path']}"
            if (entry["model"], entry["model_hash"]) != (model["name"], model["hash"]):
                raise ImageSetError(
                    f"{where}: drawn by '{entry['model']}' ({entry['model_hash']}) in a folder of "
                    f"'{model['name']}' ({model['hash']}); one folder holds one model"
                )
            if entry["prompt_id"] not in names:
                raise ImageSetError(f"{where}: its prompt '{entry['prompt_id']}' is not in {PROMPTS}")
            path = folder / entry["path"]
            if path.parent not in inside:
                inside[path.parent] = path.parent.resolve().is_relative_to(root)
            if not inside[path.parent] or (path.is_symlink() and not path.resolve().is_relative_to(root)):
                raise ImageSetError(f"{where}: lies outside its folder")
            seen.add((entry["prompt_id"], entry["sample"]))
            _check_size(folder, entry)
        if len(seen) != total or len(entries) != total:
            missing = [r.id for r in records for s in range(meta["samples"]) if (r.id, s) not in seen]
            raise ImageSetError(
                f"{folder}: {len(seen)} of {total} pictures"
                + (f", the first missing one is of prompt '{missing[0]}'" if missing else ", some listed twice")
                + "; run the same evaluation again to finish it"
            )
        return cls(folder, meta, records, entries)

    @staticmethod
    def pixels_of(folder: str | Path, entry: dict[str, Any]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] of one manifest entry, after checking its SHA-256."""
        path = Path(folder) / entry["path"]
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise ImageSetError(f"{path}: is missing; run the same evaluation again to redraw it") from None
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ImageSetError(
                f"{path}: is half-written or was changed (SHA-256 differs from {MANIFEST}); delete it and run "
                "the same evaluation again"
            )
        with Image.open(io.BytesIO(data)) as picture:
            return np.asarray(picture.convert("RGB"))

    def pixels(self) -> Iterator[tuple[dict[str, Any], NDArray[np.uint8]]]:
        """(manifest entry, uint8 [H, W, 3]) in the plan's order."""
        for entry in self.entries:
            yield entry, self.pixels_of(self.folder, entry)

    @property
    def model(self) -> ModelId:
        return ModelId(**self.meta["model"])

    @property
    def hash(self) -> str:
        """One hash of all pictures with their seeds."""
        return hashlib.sha256(canonical(self.entries).encode()).hexdigest()[:16]

    def pairs(self, other: ImageSet) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """(own entry, other's entry) of the same prompt, sample and seed.

        Raises `ImageSetError` unless both hold the same prompts, seeds and picture sizes.
        """
        theirs = {(e["prompt_id"], e["sample"]): e for e in other.entries}
        found = []
        for mine in self.entries:
            match = theirs.get((mine["prompt_id"], mine["sample"]))
            if match is None or len(theirs) != len(self.entries):
                raise ImageSetError(f"{self.folder} and {other.folder} hold different prompts; draw both alike")
            for key, what in (("seed", "seeds"), ("height", "heights"), ("width", "widths")):
                if mine[key] != match[key]:
                    raise ImageSetError(
                        f"{self.folder} and {other.folder} have different {what} ({mine[key]} and {match[key]} "
                        f"for '{mine['path']}'); only pictures of the same noise are compared"
                    )
            found.append((mine, match))
        return found


def read_meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ImageSetError(f"{folder}: there is no such folder")
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ImageSetError(f"{folder}: not a folder of pictures (it has no {META})") from None
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise ImageSetError(f"{folder / META}: is not JSON") from None
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise ImageSetError(f"{folder}: not a folder of pictures ({META} is of another kind)")
    if meta.get("version") != VERSION:
        raise ImageSetError(f"{folder}: picture folder version {meta.get('version')!r}; this tritflow reads 1")
    demand(meta, _META, f"{folder / META}:")
    demand(meta["suite"], {"name": str}, f"{folder / META}: suite")
    demand(meta["model"], {"name": str, "hash": str}, f"{folder / META}: model")
    return meta


def _check_size(folder: Path, entry: dict[str, Any]) -> None:
    path = folder / entry["path"]
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise ImageSetError(f"{path}: is missing; run the same evaluation again to redraw it") from None
    if size != entry["bytes"]:
        raise ImageSetError(
            f"{path}: is half-written ({size} of {entry['bytes']} bytes); run the same evaluation again"
        )


def is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    try:
        _check_size(folder, entry)
    except ImageSetError:
        return False
    return True
