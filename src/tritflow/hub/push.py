"""A ternary folder onto the hub: checked byte by byte, with a card, and nothing of this machine in it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tritflow.assets import teacher_path
from tritflow.calibration.artifacts import read_json
from tritflow.formats.accounting import account
from tritflow.formats.atomic import write_atomic
from tritflow.hub.card import MARK, Facts, model_card
from tritflow.hub.licences import Licence, PushError, card_data, licence_file, licence_of
from tritflow.models import FLUX1

CARD = "README.md"
_PUBLISHED = {".json", ".safetensors", ".txt", ".model", ".jinja", ".md"}
_PICKLES = {".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle"}


@dataclass(frozen=True)
class Upload:
    """One file: its place in the repository, and its content or where it lies."""

    path: str
    content: bytes | Path

    @property
    def size(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


@dataclass(frozen=True)
class Package:
    """What is uploaded.

    Attributes:
        repo_id: `owner/name`.
        licence: of the base model and of this one.
        files: by path.
        left_out: files of the folder that are no part of a model.
    """

    repo_id: str
    licence: Licence
    files: tuple[Upload, ...]
    left_out: tuple[str, ...]


def prepare(
    folder: str | Path,
    repo_id: str,
    *,
    base_model: str | None = None,
    license: str | None = None,
    results: Sequence[str | Path] = (),
) -> Package:
    """Check a folder that `quantize` wrote, write its card (`README.md`), and list what belongs on the hub.

    Args:
        folder: of the ternary model.
        repo_id: `owner/name`.
        base_model: hub id of the model it was made from; found by itself for the built-in model, an earlier card, and
            a base in the hub's cache.
        license: of the base model, where nothing else tells it.
        results: files of evaluation runs; those of this very model go into the card.

    Raises:
        PushError: unfinished, no ternary model, a pickle, results of other models, no licence or base to be found.
        CheckpointError: a damaged file, by name.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", repo_id, re.ASCII):
        raise PushError(f"'{repo_id}' is no repository of the hub; write owner/name")
    meta = _meta(folder)
    files, left_out = _files(folder)
    transformer = _verified(folder, meta)
    config = read_json(folder / "transformer" / "config.json")
    own = _is_built_in(meta)
    base_folder = teacher_path() if own else _base_folder(meta)
    places = [folder, *([base_folder] if base_folder else [])]
    licence = licence_of(config, [place / CARD for place in places], own, license)
    base = None if own else base_model or _base_model(folder, meta)
    if base is None and not own:
        raise PushError("the model it was made from is not known on the hub; name it: --base-model OWNER/NAME")
    files = {**files, "meta.json": _published_meta(meta, base)}
    terms = licence_file(places)
    if terms is not None:
        files[terms.name] = terms
    elif licence.strict:
        raise PushError(f"{licence} must go along with the model; put its text into {folder / 'LICENSE.md'}")
    complete = (folder / "model_index.json").is_file()
    index = read_json(folder / "model_index.json") if complete else {}
    pipeline = index.get("_class_name") or (
        "FluxPipeline" if config["_class_name"] == FLUX1.transformer_class else "DiffusionPipeline"
    )
    generation = folder / "generation.json"
    facts = Facts(
        repo_id,
        base,
        licence,
        meta,
        transformer,
        sum(Upload(name, content).size for name, content in files.items() if name != CARD),
        (config["_class_name"], str(pipeline)),
        complete,
        read_json(generation) if generation.is_file() else {},
        _runs_of(folder, results, base_folder),
    )
    card = model_card(facts).encode()
    write_atomic(folder / CARD, card)
    files[CARD] = card
    return Package(repo_id, licence, tuple(Upload(k, v) for k, v in sorted(files.items())), tuple(left_out))


def push(package: Package, *, private: bool = False, api: Any = None) -> str:
    """Upload in one commit; returns the commit's address. The repository is made if need be.

    Args:
        api: a `huggingface_hub.HfApi`, or what answers like one.

    Raises:
        PushError: not logged in, not allowed, no way to the hub.
    """
    import huggingface_hub

    operations = [
        huggingface_hub.CommitOperationAdd(
            path_in_repo=file.path,
            path_or_fileobj=file.content if isinstance(file.content, bytes) else str(file.content),
        )
        for file in package.files
    ]
    api = huggingface_hub.HfApi() if api is None else api
    try:
        api.whoami()
        api.create_repo(package.repo_id, private=private, exist_ok=True)
        done = api.create_commit(package.repo_id, operations, commit_message="Ternary model by tritflow")
    except Exception as error:
        raise PushError(_explained(error, package.repo_id)) from error
    return str(getattr(done, "commit_url", "") or f"https://huggingface.co/{package.repo_id}")


def _explained(error: Exception, repo_id: str) -> str:
    names = {base.__name__ for base in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if "LocalTokenNotFoundError" in names or status == 401:
        return "not logged in to the hub: run `hf auth login`, or set HF_TOKEN to a token that may write"
    if status == 403:
        return f"this token may not write to {repo_id}; take one with write access, or another owner"
    if names & {"ConnectionError", "TransportError", "OfflineModeIsEnabled", "Timeout", "TimeoutError"}:
        return f"the hub cannot be reached ({type(error).__name__}); check the network and HF_HUB_OFFLINE, then again"
    return f"the hub refused {repo_id} ({type(error).__name__}): {first[:200]}"


def _meta(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise PushError(f"{folder}: there is no such folder")
    path = folder / "meta.json"
    meta = read_json(path) if path.is_file() else {}
    if meta.get("kind") != "ternary":
        raise PushError(f"{folder}: not a folder that `tritflow quantize` wrote (no meta.json of a ternary model)")
    if not meta.get("complete"):
        raise PushError(f"{folder}: is unfinished; run the `tritflow quantize` that was writing it again")
    return meta


def _files(folder: Path) -> tuple[dict[str, bytes | Path], list[str]]:
    found: dict[str, bytes | Path] = {}
    left_out = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        place = path.relative_to(folder)
        if any(part.startswith(".") for part in place.parts):
            continue
        if path.suffix.lower() in _PICKLES:
            raise PushError(f"{path}: is a pickle, which no one should have to load; remove it")
        if path.suffix in _PUBLISHED or path.name == "LICENSE":
            found[place.as_posix()] = _without_origin(path)
        else:
            left_out.append(place.as_posix())
    return found, left_out


def _without_origin(path: Path) -> bytes | Path:
    """A config without the place on this machine that the libraries note in it; other files as they are."""
    if path.name not in ("config.json", "model_index.json"):
        return path
    config = read_json(path)
    origin = config.pop("_name_or_path", "")
    return (json.dumps(config, indent=2) + "\n").encode() if Path(str(origin)).is_absolute() else path


def _verified(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """The ternary transformer's account, after reading every byte of it and the other parts' headers."""
    found = account(folder)[0]
    if not found.ternary:
        raise PushError(f"{folder}: its transformer is dense; `tritflow quantize` makes a ternary one")
    if found.digest != meta["digest"]:
        raise PushError(f"{folder}: the transformer is not the one that meta.json tells of (another digest)")
    return found.summary()


def _base_folder(meta: dict[str, Any]) -> Path | None:
    base = meta.get("base")
    return Path(base) if base and Path(base).is_absolute() and Path(base).is_dir() else None


def _base_model(folder: Path, meta: dict[str, Any]) -> str | None:
    base = str(meta.get("base") or "")
    cached = re.search(r"models--([^/\\]+?)--([^/\\]+)", base)
    if cached:
        return f"{cached[1]}/{cached[2]}"
    if re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", base, re.ASCII) and not Path(base).exists():
        return base
    card = folder / CARD
    if card.is_file() and MARK in card.read_text(encoding="utf-8", errors="replace"):
        return card_data(card).get("base_model")
    return None


def _is_built_in(meta: dict[str, Any]) -> bool:
    """Whether it was made from the small FLUX of the package, told by the source's fingerprint."""
    from tritflow.assets import AssetError, asset_path
    from tritflow.formats.source import open_source

    try:
        source = open_source(asset_path("small") / "transformer").fingerprint()
    except AssetError:
        return False
    return bool((meta.get("parents") or {}).get("source") == source)


def _published_meta(meta: dict[str, Any], base: str | None) -> bytes:
    """meta.json with the base by its hub id: where it lay on this machine is nobody's business."""
    rest = {key: value for key, value in meta.items() if key != "base"}
    found = {**rest, "base": base} if "base" in meta and base else rest
    return (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode()


def _runs_of(folder: Path, results: Sequence[str | Path], base: Path | None) -> list[dict[str, Any]]:
    """Newest run of each suite, mode and backend that evaluated this very model."""
    if not results:
        return []
    from tritflow.evaluation.models import fingerprint
    from tritflow.pipelines.loading import ModelError, resolve_model
    from tritflow.results import read

    try:
        source = resolve_model(folder, base)
    except ModelError:
        raise PushError(
            f"{folder} holds a transformer alone and tells of no base on this machine, so results cannot be told to be "
            "of it; leave out --results"
        ) from None
    parts: list[str | Path] = [source.pipeline]
    if source.transformer is not None:
        parts.insert(0, source.transformer)
    own = fingerprint(parts)
    newest: dict[str, dict[str, Any]] = {}
    for path in results:
        for run in read(path):
            if "scores" in run and run.get("model", {}).get("hash") == own:
                extra = run["settings"]["extra"]
                newest[repr([run["task"]["name"], extra.get("mode"), extra.get("backend")])] = run
    if not newest:
        raise PushError(f"{', '.join(map(str, results))}: hold no evaluation of this very model ({own})")
    return list(newest.values())
