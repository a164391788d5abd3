"""Roundings on disk while a job runs: a file a block, read back one linear at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from tritflow.formats.atomic import write_atomic
from tritflow.formats.packing import pack_2bit, unpack_2bit
from tritflow.quantization.rounding import Rounded


class RoundedStore(Mapping[str, Rounded]):
    """A mapping from module name to `Rounded`, kept in a folder.

    Args:
        folder: made when the first group is written.
        job: groups of another job are not seen, and are overwritten.
    """

    def __init__(self, folder: Path, job: str) -> None:
        self.folder, self.job = folder, job
        self._where: dict[str, tuple[Path, int]] = {}
        self._groups: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(path, framework="pt") as stream:
                    note = json.loads(stream.metadata()["tritflow"])
            except (SafetensorError, KeyError, TypeError, ValueError):
                continue  # cut short by a power failure: made again
            if note["job"] == job:
                self._add(path, note["in_features"])

    def _add(self, path: Path, in_features: dict[str, int]) -> None:
        self._groups.add(path.stem)
        self._where |= {name: (path, k) for name, k in in_features.items()}

    def has_group(self, group: str) -> bool:
        """Whether `write(group, ...)` was done for this job, now or in an earlier run."""
        return group in self._groups

    def write(self, group: str, rounded: Mapping[str, Rounded]) -> None:
        """Write the linears of one group (a block) atomically."""
        tensors = {}
        for name, q in rounded.items():
            tensors[f"{name}/packed"] = pack_2bit(q.trits.cpu())
            parts = {"weight_scale": q.weight_scale, "input_scale": q.input_scale, "bias": q.bias}
            tensors |= {f"{name}/{k}": v.float().cpu().contiguous() for k, v in parts.items() if v is not None}
        in_features = {name: q.trits.shape[1] for name, q in rounded.items()}
        path = self.folder / f"{group}.safetensors"
        self.folder.mkdir(parents=True, exist_ok=True)
        note = json.dumps({"job": self.job, "in_features": in_features}, sort_keys=True)
        write_atomic(path, save(tensors, {"tritflow": note}))
        self._add(path, in_features)

    def __getitem__(self, name: str) -> Rounded:
        path, in_features = self._where[name]
        with safe_open(path, framework="pt") as stream:
            parts = {
                key.rpartition("/")[2]: stream.get_tensor(key)
                for key in stream.keys()  # noqa: SIM118 (safe_open is no mapping)
                if key.rpartition("/")[0] == name
            }
        trits = unpack_2bit(parts.pop("packed"), in_features)
        return Rounded(trits, parts["weight_scale"], parts.get("input_scale"), parts.get("bias"))

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)
