"""Filling a folder of pictures, batch by batch, so that a killed run resumes to the same bytes.

The plan (which picture comes from which seed, in which batch) follows from meta.json and prompts.jsonl alone.
A resumed run forms the same batches again, so its folder equals an unbroken run's byte for byte; this is why
nothing here writes a time of day, and why another device or torch version is refused instead of mixed in.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

from PIL import Image

from tritflow.evaluation.api import Draw, EvaluationError, Progress, PromptRecord, Task, prompts_hash
from tritflow.evaluation.images import (
    KIND,
    MANIFEST,
    META,
    PROMPTS,
    VERSION,
    ImageSet,
    ImageSetError,
    ModelId,
    Settings,
    cut_half_line,
    is_whole,
    read_manifest,
    read_meta,
)
from tritflow.formats.atomic import disk_full, is_disk_full
from tritflow.results import canonical, write_atomically

# zlib's fastest level, and of PNG's filtered rows nothing but runs: less time than the default strategy and an eighth
# fewer bytes, both in detailed pictures and in flat ones, since filtered rows hardly repeat elsewhere.
_PNG: dict[str, int] = {"compress_level": 1, "compress_type": zlib.Z_RLE}
_BUFFER = 256 << 10
# meta.json keys that say how pictures were made; a difference means that they may not share a folder.
_IDENTITY = (
    "suite",
    "model",
    "settings",
    "prompts_hash",
    "samples",
    "base_seed",
    "batch_size",
    "device",
    "versions",
)


def seed_of(base_seed: int, prompt_id: str, sample: int) -> int:
    """The seed of one picture: 31 bits of SHA-256, so that it depends on no other prompt of the run."""
    key = f"{base_seed}/{prompt_id}/{sample}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:4], "big") & 0x7FFFFFFF


class Sink(Protocol):
    """Takes a file's bytes piece by piece."""

    def write(self, data: bytes, /) -> int: ...


Encode = Callable[[Image.Image, Sink], None]
"""Writes a picture's file into a sink."""


def write_png(picture: Image.Image, sink: Sink) -> None:
    """Write an RGB picture as PNG, without metadata."""
    plain = picture if picture.mode == "RGB" else picture.convert("RGB")
    # PIL asks no more of a file than `write`.
    plain.save(cast("io.BytesIO", sink), "PNG", **_PNG)


def encode_png(picture: Image.Image) -> bytes:
    """The bytes of `write_png`."""
    buffer = io.BytesIO()
    write_png(picture, buffer)
    return buffer.getvalue()


class FileSink:
    """A file that is hashed while it is written: each piece is in the processor's cache then, and is read once.

    Attributes:
        size: bytes so far.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb", buffering=_BUFFER)  # noqa: SIM115  (closed by `close`)
        self._hash = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes, /) -> int:
        self._hash.update(data)
        self._file.write(data)
        self.size += len(data)
        return len(data)

    def close(self) -> str:
        """The SHA-256 of the whole file, which has reached the operating system."""
        self._file.close()
        return self._hash.hexdigest()


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _replace(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _describe(key: str, value: Any) -> str:
    return f"{value['name']} {value.get('version')}" if key == "suite" else json.dumps(value, sort_keys=True)


def _begin(folder: Path, meta: dict[str, Any], records: Sequence[PromptRecord], task: Task) -> None:
    """Write meta.json, prompts.jsonl and sidecars, or check that those there are the same run's."""
    if (folder / META).exists():
        old = read_meta(folder)
        for key in _IDENTITY:
            if old.get(key) != meta[key]:
                raise ImageSetError(
                    f"{folder}: was begun with another {key.replace('_', ' ')} "
                    f"({_describe(key, old.get(key))}, now {_describe(key, meta[key])}); use another folder"
                )
    # Another rank may have begun between the two looks.
    elif any(not p.name.startswith(".") for p in folder.iterdir()) and not (folder / META).exists():
        raise ImageSetError(f"{folder}: is not empty and not a folder of pictures; choose another one")
    # meta.json comes first: a folder that has it is ours to go on with, whatever else a kill left out.
    _keep(folder / META, (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())
    for path, data in task.sidecars(records).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        _keep(folder / path, data)
    _keep(folder / PROMPTS, "".join(canonical(r.to_dict()) + "\n" for r in records).encode())


def _keep(path: Path, data: bytes) -> None:
    """Write a file that is the same for every rank and every resumed run, unless it is there."""
    if not path.exists() or path.read_bytes() != data:
        _replace(path, data)


def plan(
    task: Task, records: Sequence[PromptRecord], model: ModelId, settings: Settings, samples: int, base_seed: int
) -> list[dict[str, Any]]:
    """What every picture of the run will be, in order: a manifest line without size and hash."""
    if len({r.id for r in records}) != len(records):
        raise EvaluationError(f"{task.name}: two prompts share one id")
    return [
        {
            "path": task.picture_path(record, index, sample),
            "prompt_id": record.id,
            "prompt": record.text,
            "tag": record.tag,
            "sample": sample,
            "seed": seed_of(base_seed, record.id, sample),
            "model": model.name,
            "model_hash": model.hash,
            "height": settings.height,
            "width": settings.width,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
        }
        for index, record in enumerate(records)
        for sample in range(samples)
    ]


def draw_images(
    folder: str | Path,
    task: Task,
    records: Sequence[PromptRecord],
    draw: Draw | Callable[[], Draw],
    model: ModelId,
    settings: Settings,
    *,
    samples: int = 4,
    base_seed: int = 0,
    batch_size: int = 16,
    device: str = "cpu",
    versions: dict[str, str] | None = None,
    shard: tuple[int, int] = (0, 1),
    lazy: bool = False,
    encode: Encode = write_png,
    progress: Progress | None = None,
) -> ImageSet | None:
    """Draw whatever is missing of a suite's pictures into `folder`.

    Encoding and writing run beside the drawing of the next batch. A picture counts once its line is in the
    manifest; a batch with any picture missing is drawn again as a whole.

    Args:
        draw: see `api.Draw`; with `lazy`, a function without arguments that returns one and is called only when
            something is missing (a finished folder then costs no model load).
        samples: pictures a prompt.
        base_seed: of all seeds (`seed_of`).
        shard: (rank, world): draw every world-th batch; each rank keeps its own manifest part, and rank 0, called
            when all of them are done, joins the parts (two that finished together would get in each other's way).
        device, versions: where pictures are drawn; a folder begun elsewhere is refused.

    Returns the finished set, or None while other ranks' pictures are missing and on ranks other than 0.
    Raises `ImageSetError` when the folder was begun with other settings, and `EvaluationError` when `draw`
    returns the wrong number or size of pictures.
    """
    folder = Path(folder)
    if not records:
        raise EvaluationError(f"{task.name}: there are no prompts to draw")
    if samples < 1 or batch_size < 1:
        raise EvaluationError(f"samples ({samples}) and batch size ({batch_size}) must be at least 1")
    meta = {
        "kind": KIND,
        "version": VERSION,
        "suite": {"name": task.name, "version": task.version},
        "model": asdict(model),
        "settings": asdict(settings),
        "prompts_hash": prompts_hash(records),
        "samples": samples,
        "base_seed": base_seed,
        "batch_size": batch_size,
        "device": device,
        "versions": versions or {},
    }
    entries = plan(task, records, model, settings, samples, base_seed)
    folder.mkdir(parents=True, exist_ok=True)
    _begin(folder, json.loads(canonical(meta)), records, task)
    for parent in {(folder / e["path"]).parent for e in entries}:
        parent.mkdir(parents=True, exist_ok=True)

    rank, world = shard
    done = {e["path"]: e for e in _drawn(folder)}
    own = folder / (MANIFEST if world == 1 else f"{MANIFEST}.{rank}")
    batches = [entries[i : i + batch_size] for i in range(0, len(entries), batch_size)][rank::world]
    total = sum(map(len, batches))
    finished = sum(e["path"] in done for b in batches for e in b)
    if progress is not None:
        progress(finished, total)
    todo = [b for b in batches if any(e["path"] not in done for e in b)]
    if todo:
        drawer: Draw = draw() if lazy else draw  # type: ignore[call-arg,assignment]
        if progress is not None:  # loading is over: what follows is drawing
            progress(finished, total)
        cut_half_line(own)
        with ThreadPoolExecutor(1) as writer, open(own, "ab") as manifest:
            waiting: list[Future[dict[str, Any]]] = []
            try:
                for batch in todo:
                    pictures = drawer([e["prompt"] for e in batch], [e["seed"] for e in batch])
                    _check_pictures(pictures, batch)
                    finished += _note(waiting, manifest, done)
                    waiting = [
                        writer.submit(_write_picture, folder, e, encode, p)
                        for e, p in zip(batch, pictures, strict=True)
                        if e["path"] not in done
                    ]
                    if progress is not None:  # with those that are being written
                        progress(finished + len(waiting), total)
            finally:
                finished += _note(waiting, manifest, done)
        if progress is not None:
            progress(finished, total)
    if rank != 0:
        return None
    if world > 1:  # other ranks have written meanwhile
        done = {e["path"]: e for e in _drawn(folder)}
    if any(e["path"] not in done for e in entries):
        return None
    joined = "".join(canonical(done[e["path"]]) + "\n" for e in entries).encode()
    if not (folder / MANIFEST).exists() or (folder / MANIFEST).read_bytes() != joined:
        write_atomically(folder / MANIFEST, joined)
    for part in folder.glob(f"{MANIFEST}.*"):
        part.unlink(missing_ok=True)
    for left in folder.rglob(".*.tmp"):
        left.unlink(missing_ok=True)
    return ImageSet.open(folder, task)


def _drawn(folder: Path) -> list[dict[str, Any]]:
    """Manifest lines (all ranks') whose picture is there in full length."""
    lines = [e for path in sorted(folder.glob(f"{MANIFEST}*")) for e in read_manifest(path)]
    return [e for e in lines if is_whole(folder, e)]


def _write_picture(folder: Path, entry: dict[str, Any], encode: Encode, picture: Image.Image) -> dict[str, Any]:
    path = folder / entry["path"]
    temporary = _temporary(path)
    try:
        sink = FileSink(temporary)
        try:
            encode(picture, sink)
        finally:
            sha256 = sink.close()
        # No fsync: a picture lost with the machine is drawn again, and its manifest line carries its hash.
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if is_disk_full(error):
            raise disk_full(path) from error
        raise
    return {**entry, "bytes": sink.size, "sha256": sha256}


def _note(waiting: list[Future[dict[str, Any]]], manifest: Any, done: dict[str, dict[str, Any]]) -> int:
    """Append finished pictures to the manifest, in order; returns how many."""
    for future in waiting:
        entry = future.result()
        manifest.write((canonical(entry) + "\n").encode())
        done[entry["path"]] = entry
    manifest.flush()
    count = len(waiting)
    waiting.clear()
    return count


def _check_pictures(pictures: Sequence[Image.Image], batch: list[dict[str, Any]]) -> None:
    if len(pictures) != len(batch):
        raise EvaluationError(f"the pipeline returned {len(pictures)} pictures for {len(batch)} prompts")
    for picture, entry in zip(pictures, batch, strict=True):
        if picture.size != (entry["width"], entry["height"]):
            raise EvaluationError(
                f"the pipeline drew {picture.size[0]}x{picture.size[1]} pixels, asked for "
                f"{entry['width']}x{entry['height']}"
            )
