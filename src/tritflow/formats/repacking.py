"""Changing how a ternary model's trits lie on disk, losslessly, one layer at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tritflow.config import Packing
from tritflow.formats.atomic import disk_full, is_disk_full, temporary_name
from tritflow.formats.checkpoint import TernaryFolder, TransformerWriter
from tritflow.formats.errors import CheckpointError
from tritflow.formats.locate import resolve
from tritflow.formats.packing import repack
from tritflow.formats.writer import DEFAULT_SHARD_BYTES

Progress = Callable[[int, int], None]
# In a pipeline's folder: what a later distillation starts from.
LATENTS = "latents.safetensors"


def convert_folder(
    source: str | Path,
    out: str | Path,
    packing: Packing,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    progress: Progress | None = None,
) -> Path:
    """Write a ternary model again with another packing; trits, scales and all other tensors stay bit for bit.

    A pipeline folder is copied with all its parts but the latents that a further distillation starts from: those belong
    to the bytes of the source. Its meta.json tells of the new bytes. Killed at any moment, the same call goes on.

    Args:
        source: a ternary pipeline or transformer folder.
        out: the folder to write; not the source itself.
        packing: `2bit` or `base3`.
        max_shard_bytes: as in `TransformerWriter`.
        progress: called with (layers done, layers in all).

    Returns:
        The transformer folder written.

    Raises:
        CheckpointError: the source is damaged or not ternary, or `out` holds something else.
        DiskFullError: no space left.
    """
    location = resolve(source)
    out = Path(out)
    pipeline = location.pipeline if Path(source).resolve() != location.transformer.resolve() else None
    if location.transformer.is_file():
        raise CheckpointError(f"{source} is a single dense file; `tritflow quantize` makes it ternary")
    if out.resolve() in (location.transformer.resolve(), pipeline and pipeline.resolve()):
        raise CheckpointError(f"{out} is the source itself; give another folder")
    if pipeline and pipeline.resolve() in out.resolve().parents:
        raise CheckpointError(f"{out} lies inside the source; give a folder outside of it")
    target = out / "transformer" if pipeline else out
    folder = TernaryFolder(location.transformer)
    _convert_transformer(folder, target, packing, max_shard_bytes, progress)
    if pipeline:
        _copy_rest(pipeline, location.transformer, out, {folder.digest: TernaryFolder(target).digest})
    return target


def _convert_transformer(
    folder: TernaryFolder, out: Path, packing: Packing, max_shard_bytes: int, progress: Progress | None
) -> None:
    old = folder.ternary.packing
    ternary = dataclasses.replace(folder.ternary, packing=packing)
    writer = TransformerWriter(out, ternary, f"convert {folder.digest}", max_shard_bytes)
    if writer.finished:
        _require_same(folder, TernaryFolder(out), packing)
        return
    dense = folder.dense_names()
    total = len(folder.linears) + len(dense)
    for done, (name, in_features) in enumerate(folder.linears.items(), 1):
        if name not in writer:
            linear = folder.linear(name)
            packed = linear.packed if old == packing else repack(linear.packed, in_features, old, packing)
            writer.add_packed(name, packed, in_features, linear.weight_scale, linear.input_scale, linear.bias)
        if progress:
            progress(done, total)
    for done, name in enumerate(dense, 1 + len(folder.linears)):
        if name not in writer:
            writer.add_dense(name, folder.tensor(name))
        if progress:
            progress(done, total)
    writer.finish(folder.config)


def _require_same(source: TernaryFolder, made: TernaryFolder, packing: Packing) -> None:
    """`made` was there already: accept it only if it is what this conversion would give."""
    same = (
        made.ternary == dataclasses.replace(source.ternary, packing=packing)
        and made.config == source.config
        and made.linears == source.linears
        and set(made.names()) == set(source.names())
        and all(
            made.checksum(name) == source.checksum(name)
            for name in source.names()
            if source.ternary.packing == packing or name.removesuffix(".weight") not in source.linears
        )
    )
    if not same:
        raise CheckpointError(f"{made.path} already holds another ternary model; choose another folder or delete it")


def _copy_rest(pipeline: Path, transformer: Path, out: Path, digests: dict[str, str]) -> None:
    """Everything but the transformer and its latents, meta.json with the new digest for the old one; model_index.json
    last, since it makes the folder a pipeline."""
    left_out = pipeline / LATENTS
    files = [p for p in sorted(pipeline.rglob("*")) if p.is_file() and transformer not in p.parents and p != left_out]
    files.sort(key=lambda p: p.name == "model_index.json")
    for path in files:
        copy = out / path.relative_to(pipeline)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            temporary = temporary_name(copy)
            if path == pipeline / "meta.json":
                temporary.write_bytes(_with_digest(path, digests))
            else:
                shutil.copyfile(path, temporary)
            os.replace(temporary, copy)
        except OSError as error:
            temporary_name(copy).unlink(missing_ok=True)
            if is_disk_full(error):
                raise disk_full(copy) from error
            raise


def _with_digest(path: Path, digests: dict[str, str]) -> bytes:
    """A meta.json whose digest, if it is one of `digests`, is what stands there for it; another file as it is."""
    data = path.read_bytes()
    try:
        meta = json.loads(data)
        meta["digest"] = digests[meta["digest"]]
    except (ValueError, KeyError, TypeError):
        return data
    return (json.dumps(meta, indent=2, ensure_ascii=False) + "\n").encode()
