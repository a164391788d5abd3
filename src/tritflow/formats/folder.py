"""Which safetensors files make up a diffusers model folder, seen as one set of tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.formats.errors import CheckpointError
from tritflow.formats.safetensors_file import Entry, SafetensorsFile, refuse_pickle, strict_json
from tritflow.formats.writer import INDEX, PARTS, WEIGHTS


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises `CheckpointError` when it is missing, damaged or something else."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except IsADirectoryError as error:
        raise CheckpointError(f"{path} is a folder where a file belongs") from error
    value = strict_json(data, str(path))
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object: the file is damaged")
    return value


class TensorFolder:
    """The tensors of a model folder, sharded or not, read one at a time.

    Args:
        path: a folder such as `transformer/`, with one safetensors file, or several and their index.

    Attributes:
        path: the folder.
        files: the open safetensors files.

    Raises:
        CheckpointError: no weights, a pickle in their place, an unfinished job, or files that contradict the index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(
                f"{self.path} is not a folder" if self.path.exists() else f"{self.path} does not exist"
            )
        if (self.path / PARTS / "job").exists():
            raise CheckpointError(f"{self.path} is unfinished; run the command that was writing it again, it resumes")
        index = self._index()
        if index is None:
            self.files = [SafetensorsFile(self._single())]
            self._where = dict.fromkeys(self.files[0].entries, self.files[0])
        else:
            self.files = [SafetensorsFile(self.path / name) for name in sorted(set(index.values()))]
            self._where = self._join(index)

    def _index(self) -> dict[str, str] | None:
        found = (
            [self.path / INDEX] if (self.path / INDEX).exists() else sorted(self.path.glob("*.safetensors.index.json"))
        )
        if not found:
            return None
        weight_map = read_json_object(found[0]).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{found[0]}: no weight_map: the file is damaged")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file or "\0" in file or "\\" in file:
                raise CheckpointError(f"{found[0]}: '{name[:120]}' lies in no file of this folder: damaged")
            refuse_pickle(self.path / file, b"")
        return weight_map

    def _single(self) -> Path:
        preferred = self.path / f"{WEIGHTS}.safetensors"
        if preferred.exists():
            return preferred
        found = sorted(p for p in self.path.glob("*.safetensors") if not p.name.startswith("."))
        if len(found) == 1 and "-of-" not in found[0].name:
            return found[0]
        if found:
            raise CheckpointError(
                f"{self.path} holds {len(found)} safetensors file(s) such as {found[0].name} but no "
                f"{WEIGHTS}.safetensors and no index: a file is missing"
            )
        for path in sorted(self.path.iterdir()):
            refuse_pickle(path, b"")
        raise CheckpointError(f"{self.path} holds no safetensors file")

    def _join(self, index: dict[str, str]) -> dict[str, SafetensorsFile]:
        where: dict[str, SafetensorsFile] = {}
        for file in self.files:
            for name in file.entries:
                if index.get(name) != file.path.name or name in where:
                    raise CheckpointError(
                        f"{file.path} holds '{name[:120]}', which the index places in {index.get(name)}: damaged"
                    )
                where[name] = file
        missing = sorted(set(index) - set(where))
        if missing:
            raise CheckpointError(f"{self.path}: the index promises '{missing[0][:120]}', which no file holds")
        return where

    def names(self) -> list[str]:
        """Tensor names in file order."""
        return list(self._where)

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def file(self, name: str) -> SafetensorsFile:
        """The file that holds a tensor. Raises `CheckpointError` when there is no such tensor."""
        if name not in self._where:
            raise CheckpointError(f"{self.path} has no tensor '{name}'")
        return self._where[name]

    def entry(self, name: str) -> Entry:
        """Dtype, shape and size of a tensor, from the header alone."""
        return self.file(name).entry(name)

    def tensor(self, name: str, rows: slice | None = None, device: torch.device | str = "cpu") -> Tensor:
        """Read one tensor (or rows of it) into fresh memory of `device`."""
        return self.file(name).tensor(name, rows, device)
