"""Telling whose verdicts an official scorer left: of this very folder of pictures, or of another model's.

Two models' folders hold the same prompts under the same file names, so names alone prove nothing. A stamp does: lines
as `sha256sum` writes them, of the manifest (hence of all pictures) and of each file that the scorer left. The scripts
in `envs/` write it right after scoring.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.images import MANIFEST, ImageSet, ImageSetError

STAMP = "official.sha256"
"""In the picture folder; of several lines for one file the last one counts."""


def check_stamp(images: ImageSet, left: str, *, required: bool) -> None:
    """Raises `ImageSetError` unless the stamp says that `left` was made from the pictures that are there now.

    Args:
        left: what the scorer left, relative to the folder.
        required: whether to refuse a folder without a stamp for this file.
    """
    path = images.folder / STAMP
    lines = _stamped(path)
    by_hand = f"cd {images.folder} && sha256sum {MANIFEST} {left} >> {STAMP}"
    if left not in lines or MANIFEST not in lines:
        if required or lines:
            raise ImageSetError(
                f"{images.folder / left}: nothing says which pictures it is of; run the scorer with the script in "
                f"envs/, or, if it was run on these very pictures, note it: {by_hand}"
            )
        return
    if lines[MANIFEST] != _sha256(images.folder / MANIFEST):
        raise ImageSetError(
            f"{path}: is of other pictures (another model's, or those before they were drawn again); "
            f"run the official scorer on {images.folder} again"
        )
    if lines[left] != _sha256(images.folder / left):
        raise ImageSetError(
            f"{images.folder / left}: is not the file that {STAMP} names (copied from another folder, or changed); "
            "run the official scorer again"
        )


def check_root(images: ImageSet, left: Path, filenames: Iterable[str], depth: int) -> list[str]:
    """The pictures' paths inside the folder, from what a scorer calls them; `depth` parts each.

    A scorer may have run on another machine, so the folder's place may differ, but not its name, which holds the
    model's hash. Raises `ImageSetError` for names that lie in another folder, or in none that can be told.
    """
    inside = []
    for name in filenames:
        parts = PurePosixPath(str(name).replace("\\", "/")).parts
        root = PurePosixPath(*parts[:-depth]) if len(parts) > depth else PurePosixPath()
        if root.name in ("", "..", "."):
            raise ImageSetError(
                f"{left}: calls a picture '{name}', which does not say of which folder; run the official scorer on "
                f"the folder by its name ({images.folder.name})"
            )
        if root.name != images.folder.resolve().name or _elsewhere(Path(root), images.folder):
            raise ImageSetError(
                f"{left}: is of the pictures in {root}, not of those in {images.folder}; run the official scorer here"
            )
        inside.append("/".join(parts[-depth:]))
    return inside


def _elsewhere(root: Path, folder: Path) -> bool:
    """Whether an absolute root is another folder of this machine that happens to have the same name."""
    return root.is_absolute() and root.is_dir() and not root.samefile(folder)


def check_names(left: Path, found: Sequence[str], expected: Iterable[str]) -> None:
    """Raises `ImageSetError`, naming a picture, unless `found` is `expected`, each once, in any order."""
    wanted = set(expected)
    seen: set[str] = set()
    for name in found:
        if name not in wanted:
            raise ImageSetError(f"{left}: holds a verdict on {name}, which is no picture of this folder")
        if name in seen:
            raise ImageSetError(f"{left}: holds two verdicts on {name}; run the official scorer again")
        seen.add(name)
    if missing := sorted(wanted - seen):
        raise ImageSetError(
            f"{left}: holds no verdict on {missing[0]} ({len(seen)} of {len(wanted)} are there); "
            "run the official scorer again"
        )


def read_json(path: Path, what: str) -> Any:
    """A scorer's JSON. Raises `EvaluationError` when it is not there or is not `what`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{path}: {what} is not there; run the official script on this folder first") from None
    except (UnicodeDecodeError, ValueError):
        raise EvaluationError(f"{path}: is not {what} (no JSON)") from None


def _stamped(path: Path) -> dict[str, str]:
    if not path.exists():
        return {}
    found = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = re.fullmatch(r"([0-9a-f]{64}) [ *](?:\./)?(.+)", line)
        if match is None:
            raise ImageSetError(f"{path}: line {number} is not what sha256sum writes; delete the file and stamp again")
        found[match[2]] = match[1]
    return found


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise EvaluationError(f"{path}: is not there; run the official script on this folder first") from None
