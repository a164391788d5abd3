"""From what a user types to the files meant: a pipeline folder, a transformer folder, a single file, a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tritflow.config import nearest
from tritflow.formats.architecture import is_known
from tritflow.formats.errors import CheckpointError
from tritflow.formats.folder import read_json_object
from tritflow.formats.safetensors_file import refuse_pickle

HUB_PATTERNS = [
    "model_index.json",
    "config.json",
    "generation.json",
    "calibration_prompts.txt",
    "meta.json",
    "diffusion_pytorch_model*.safetensors*",
    "*/*.safetensors",
    "*/*.json",
    "*/*.txt",
    "*/*.model",
    "*/*.jinja",
]
"""What is fetched of a hub repository. A single-file copy in its root is left there."""


@dataclass(frozen=True)
class Location:
    """Where a model lies.

    Attributes:
        transformer: the transformer folder, or a single safetensors file.
        pipeline: the pipeline folder around it, if there is one.
    """

    transformer: Path
    pipeline: Path | None = None


def resolve(path: str | Path) -> Location:
    """Find the transformer, and the pipeline around it, that `path` means.

    Args:
        path: a pipeline folder (model_index.json), a transformer folder (config.json), a folder that holds just
            `transformer/`, a safetensors file, or a hub id: `org/name`, or `org/name/file.safetensors`.

    Raises:
        CheckpointError: nothing there, a pickle, no FLUX pipeline, or a hub that cannot be reached.
    """
    found = Path(path)
    if not found.exists():
        found = fetch(str(path))
    if found.is_file():
        refuse_pickle(found, b"")
        if found.suffix == ".gguf":
            raise CheckpointError(f"{found} is a GGUF file, quantized already; give the dense model")
        return Location(found)
    if (found / "model_index.json").exists():
        index = read_json_object(found / "model_index.json")
        entry = index.get("transformer")
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if not is_known({"_class_name": kind}):
            what = f"its transformer is a {str(kind)[:80]}" if kind else "it has no transformer"
            raise CheckpointError(f"{found} is a {str(index.get('_class_name'))[:80]}, not a FLUX pipeline: {what}")
        return Location(found / "transformer", found)
    if (found / "config.json").exists():
        around = found.resolve().parent
        inside = found.name == "transformer" and (around / "model_index.json").exists()
        return Location(found, around if inside else None)
    if (found / "transformer" / "config.json").exists():
        return Location(found / "transformer")
    for file in sorted(found.iterdir()):
        refuse_pickle(file, b"")
    singles = sorted(found.glob("*.safetensors"))
    hint = f"; did you mean {singles[0]}?" if singles else ""
    raise CheckpointError(f"{found} holds neither model_index.json nor config.json: not a diffusers folder{hint}")


def resolve_transformer(path: str | Path) -> Path:
    """`resolve(path).transformer`: a transformer folder or a single file."""
    return resolve(path).transformer


def fetch(name: str) -> Path:
    """A hub repository's model (`HUB_PATTERNS`), or one file of it, in the hub's cache.

    Args:
        name: `org/name`, or `org/name/file.safetensors`.

    Raises:
        CheckpointError: no such name, or a hub that cannot be reached.
    """
    match = re.fullmatch(r"([\w][\w.-]*/[\w][\w.-]*)(?:/(.+\.safetensors))?", name, re.ASCII)
    if not match or ".." in name:
        near = nearest(name, ["small", *(p.name for p in Path().iterdir() if p.is_dir())])
        raise CheckpointError(
            f"{name} does not exist: neither a folder, a file, a hub id (owner/name) nor `small`{near}"
        )
    repository, file = match.groups()
    try:
        import huggingface_hub

        if file:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        return Path(huggingface_hub.snapshot_download(repository, allow_patterns=HUB_PATTERNS))
    except Exception as error:
        kind = type(error).__name__
        advice = "check the name and the network"
        if "Gated" in kind:
            advice = "accept its licence on the hub and log in with a token"
        elif "NotFound" in kind and "LocalEntry" not in kind:
            advice = "the hub knows no such repository or file"
        raise CheckpointError(
            f"{name} is neither a file nor a folder here, and fetching it from the hub failed ({kind}): {advice}"
        ) from error
