"""What a report is made of: results files and picture folders, found by what they are."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tritflow.evaluation.images import KIND, META, ImageSet
from tritflow.results import read

Run = dict[str, Any]


class ReportError(ValueError):
    """A report cannot be made from what was given; the message says what is missing."""


@dataclass
class Sources:
    """Runs by topic, oldest first; picture folders; pages that hold generated tables."""

    runs: dict[str, list[Run]] = field(default_factory=dict)
    pictures: list[Path] = field(default_factory=list)
    pages: list[Path] = field(default_factory=list)

    def image_sets(self) -> list[ImageSet]:
        """The picture folders, opened and checked."""
        return [ImageSet.open(folder) for folder in self.pictures]


def collect(paths: Iterable[str | Path]) -> Sources:
    """Sort what lies at `paths` into results, pictures and pages.

    A .json file holds results and a .md file is a page. A folder gives its results files (its own and each
    subfolder's results.json), the picture folders in it, and all .md files below it.

    Raises `ReportError` for something else, `ResultsError` for a damaged results file.
    """
    found = Sources()
    runs: list[Run] = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = _results_in(path), _pictures_in(path), sorted(path.rglob("*.md"))
            if not any(inside):
                raise ReportError(f"{path}: holds neither results (.json), pictures nor pages (.md)")
            for file in inside[0]:
                runs += read(file)
            found.pictures += inside[1]
            found.pages += inside[2]
        elif path.suffix == ".json":
            runs += read(path)
        elif path.suffix == ".md" and path.is_file():
            found.pages.append(path)
        elif not path.exists():
            raise ReportError(f"{path}: there is no such file or folder")
        else:
            raise ReportError(f"{path}: neither results (.json), a page (.md) nor a folder of them")
    # Runs of one moment keep the order in which they were appended; one run in two files counts once.
    unique = {run["id"]: run for run in runs}
    for run in sorted(unique.values(), key=lambda r: str(r.get("time", ""))):
        found.runs.setdefault(str(run["topic"]), []).append(run)
    return found


def _results_in(folder: Path) -> list[Path]:
    files = [p for p in sorted(folder.glob("*.json")) if p.name != META and not p.name.endswith(".flags.json")]
    return [*files, *sorted(folder.glob("*/results.json"))]


def _pictures_in(folder: Path) -> list[Path]:
    def is_set(path: Path) -> bool:
        try:
            meta = json.loads((path / META).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(meta, dict) and meta.get("kind") == KIND

    return [p for p in [folder, *sorted(folder.iterdir())] if p.is_dir() and is_set(p)]
