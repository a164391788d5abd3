"""The small FLUX that ships with the package: a teacher in full precision and its ternary student.

`teacher/` is a stock FluxPipeline folder; `student/transformer/` is a ternary transformer that takes every
other component from the teacher. On the command line `small` and `small-student` name them.
"""

from __future__ import annotations

from pathlib import Path

ASSETS = {"small": "teacher", "small-student": "student"}
_ROOT = Path(__file__).parent


class AssetError(FileNotFoundError):
    """The small FLUX was not packaged with this installation. The message names the missing folder."""


def teacher_path() -> Path:
    """The stock FluxPipeline folder of the small FLUX. Raises `AssetError` when it is not installed."""
    return asset_path("small")


def student_path() -> Path:
    """The folder whose `transformer/` is the small FLUX's ternary student. Raises `AssetError` if absent."""
    return asset_path("small-student")


def asset_path(name: str) -> Path:
    """The folder behind an asset's name on the command line. Raises `KeyError` for another name."""
    path = _ROOT / ASSETS[name]
    if not path.is_dir():
        raise AssetError(
            f"the built-in model '{name}' is missing from this installation ({path}); reinstall tritflow, "
            "or name a model folder instead"
        )
    return path
