"""The teacher's trajectories on disk: the exact keyword arguments of every forward, and the velocity it gave.

A folder holds `shard-00000.safetensors`, ..., `shared.safetensors` and `meta.json`. Inside a shard of T
trajectories with S steps, a tensor is either per step [T, S, ...] (hidden_states, timestep, velocity) or per
trajectory [T, ...] (encoder_hidden_states, pooled_projections, guidance): text is stored once, not S times.
`shared.safetensors` holds what all have in common (txt_ids, img_ids). Nothing here knows a model family: names
and shapes are whatever the recorder passes.

A shard is written whole or not at all, so a killed recording goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from tritflow.calibration.artifacts import file_sha256, read_json, write_json, write_tensors

VELOCITY = "velocity"
VERSION = 1
Split = Literal["train", "holdout", "all"]


def seed_of(*parts: int) -> int:
    """32 bits from several numbers, for a `torch.Generator`: of a larger one the CPU's takes the lower 32 bits."""
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4])


class TrajectoryError(ValueError):
    """A trajectory folder is missing, incomplete, damaged or of another configuration."""


class TrajectoryWriter:
    """Writes a trajectory folder shard by shard; an existing folder of the same identity is continued.

    Args:
        folder: created if need be.
        identity: JSON that fixes the content (config and prompts hash, seed, parents). A folder begun with
            another identity is refused, never mixed.
        provenance: JSON that does not (versions, device).
    """

    def __init__(self, folder: Path | str, identity: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._digests: dict[int, str] = {}
        self._meta: dict[str, Any] = {
            "kind": "trajectories",
            "version": VERSION,
            "identity": dict(identity),
            **provenance,
            "complete": False,
        }
        path = self.folder / "meta.json"
        if path.exists():
            found = read_json(path)
            if found.get("identity") != self._meta["identity"]:
                raise TrajectoryError(
                    f"{self.folder} holds trajectories of another configuration; choose another folder or remove it"
                )
            self._meta = found
        else:
            write_json(path, self._meta)

    @property
    def complete(self) -> bool:
        """Whether `finish` was called, now or in an earlier run."""
        return bool(self._meta["complete"])

    def has(self, shard: int) -> bool:
        """Whether the shard is there already."""
        return _shard(self.folder, shard).is_file()

    def write(self, shard: int, steps: Mapping[str, Tensor], trajectory: Mapping[str, Tensor]) -> None:
        """Write one shard.

        Args:
            shard: its number, from 0.
            steps: [T, S, ...] tensors, `velocity` among them.
            trajectory: [T, ...] tensors.
        """
        if VELOCITY not in steps:
            raise TrajectoryError("a shard needs the teacher's velocity")
        leading = {tuple(t.shape[:2]) for t in steps.values()}
        rows = {t.shape[0] for t in trajectory.values()}
        if len(leading) != 1 or rows - {next(iter(leading))[0]}:
            raise TrajectoryError(f"tensors of one shard disagree in their leading sizes: {leading}, {rows}")
        self._digests[shard] = write_tensors(
            _shard(self.folder, shard), {**steps, **trajectory}, {"step_tensors": sorted(steps), "shard": shard}
        )

    @property
    def digests(self) -> dict[int, str]:
        """SHA-256 of the shards that were written now, by number."""
        return dict(self._digests)

    def finish(
        self,
        shards: int,
        shared: Mapping[str, Tensor],
        dtypes: Mapping[str, torch.dtype],
        digests: Mapping[int, str] | None = None,
    ) -> None:
        """Close the folder.

        Args:
            shards: how many there must be.
            shared: tensors passed alike to every forward.
            dtypes: of the transformer's own keyword arguments, where the stored ones are more compact.
            digests: of shards that other writers of the same folder wrote, so that they are not read for it.
        """
        missing = [i for i in range(shards) if not self.has(i)]
        if missing:
            raise TrajectoryError(f"{self.folder}: shard {missing[0]} is missing, the recording is not complete")
        write_tensors(self.folder / "shared.safetensors", shared)
        known = {**(digests or {}), **self._digests}
        files = [_shard(self.folder, i) for i in range(shards)]
        self._meta |= {
            "complete": True,
            "dtypes": {name: str(d).removeprefix("torch.") for name, d in sorted(dtypes.items())},
            # Shards of an earlier run are read once more; a large recording would take as long again for all.
            "shards": [{"file": f.name, "sha256": known.get(i) or file_sha256(f)} for i, f in enumerate(files)],
            "shared_sha256": file_sha256(self.folder / "shared.safetensors"),
        }
        write_json(self.folder / "meta.json", self._meta)


@dataclass(frozen=True)
class Batch:
    """One batch: `student(**kwargs)` is to give `velocity`."""

    kwargs: dict[str, Tensor]
    velocity: Tensor


class Trajectories:
    """Random access to a complete folder. Shards are memory-mapped until `load` puts them on a device.

    Args:
        folder: written by `TrajectoryWriter`.
        more: other folders of as many steps and the same kind, whose trajectories come behind.
        holdout: share of the trajectories kept for validation (at least one if there are two).
        verify: compare every shard with its checksum (reads everything once).

    Raises:
        TrajectoryError: see there.
    """

    def __init__(
        self, folder: Path | str, holdout: float = 0.05, verify: bool = False, more: Sequence[Path] = ()
    ) -> None:
        self.folder = Path(folder)
        self.meta = _complete(self.folder)
        if verify:
            self._verify()
        self.shared = _load(self.folder / "shared.safetensors")
        self._shards = [_load(self.folder / s["file"]) for s in self.meta["shards"]]
        self._step_names = _step_tensors(self.folder / self.meta["shards"][0]["file"])
        for other in more:
            meta = _complete(other)
            self._shards += [_load(other / s["file"]) for s in meta["shards"]]
            if meta["dtypes"] != self.meta["dtypes"] or meta["shared_sha256"] != self.meta["shared_sha256"]:
                raise TrajectoryError(f"{other} holds trajectories of another kind than {folder}")
        self._device: torch.device | None = None
        counts = [s[VELOCITY].shape[0] for s in self._shards]
        self.steps: int = self._shards[0][VELOCITY].shape[1]
        if {s[VELOCITY].shape[1:] for s in self._shards} != {self._shards[0][VELOCITY].shape[1:]}:
            raise TrajectoryError(f"{folder}: shards differ in steps or sizes")
        self._shard_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
        self._row_of = torch.cat([torch.arange(c) for c in counts])
        self.count = sum(counts)
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0x7F1))
        kept = min(self.count - 1, max(1, round(self.count * holdout))) if holdout > 0 else 0
        self._members: dict[str, Tensor] = {
            "holdout": order[:kept].sort().values,
            "train": order[kept:].sort().values,
            "all": torch.arange(self.count),
        }

    def __len__(self) -> int:
        return self.count * self.steps

    @property
    def nbytes(self) -> int:
        """Bytes of all shards together."""
        return sum(t.nbytes for s in self._shards for t in s.values())

    def size(self, split: Split = "train") -> int:
        """How many (kwargs, velocity) pairs a split has."""
        return len(self._members[split]) * self.steps

    @property
    def device(self) -> torch.device | None:
        """Where `load` put everything; None while it is in the files."""
        return self._device

    def load(self, device: torch.device | str) -> Trajectories:
        """Put everything on `device` as one tensor a name, so that a batch is one gather, which never waits for the
        host. In place."""
        if self._device is not None and self._device == torch.device(device):
            return self
        merged = {}
        for name in sorted(self._shards[0]):
            # Filled part by part: twice all of it need not fit.
            shape = (self.count, *self._shards[0][name].shape[1:])
            merged[name] = self._shards[0][name].new_empty(shape, device=device)
            _fill(merged[name], [s.pop(name) for s in self._shards])
        self._shards = [merged]
        self.shared = {name: t.to(device) for name, t in self.shared.items()}
        self._members = {split: chosen.to(device) for split, chosen in self._members.items()}
        self._shard_of = torch.zeros(self.count, dtype=torch.long, device=device)
        self._row_of = torch.arange(self.count, device=device)
        self._device = torch.device(device)
        return self

    def pairs(self, indices: Tensor, split: Split = "train", device: torch.device | str = "cpu") -> Batch:
        """The pairs numbered `indices` ([B], below `size(split)`): kwargs in the teacher's own dtypes.

        Once loaded on a GPU, with `indices` there, nothing waits for the host: a CUDA graph can capture it.
        """
        members = self._members[split]
        indices = indices.to(members.device)
        which, step = members[indices // self.steps], indices % self.steps
        names = sorted(self._shards[0])
        gathered = {name: self._gather(name, which, step).to(device, non_blocking=True) for name in names}
        velocity = gathered.pop(VELOCITY).float()
        kwargs = {**gathered, **{name: t.to(device) for name, t in self.shared.items()}}
        dtypes = self.meta["dtypes"]
        return Batch({n: t.to(getattr(torch, dtypes[n])) if n in dtypes else t for n, t in kwargs.items()}, velocity)

    def place(self, index: int, split: Split = "train") -> tuple[int, int]:
        """(trajectory, step) of pair number `index` of a split; trajectories are numbered as they were recorded."""
        return int(self._members[split][index // self.steps]), index % self.steps

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        split: Split = "train",
        start: int = 0,
    ) -> Iterator[Batch]:
        """Endless shuffled batches; batch number `start` is the same whether or not those before it were drawn."""
        number = start
        while True:
            yield self.pairs(self.order(number, batch_size, seed, split), split, device)
            number += 1

    def order(self, number: int, batch_size: int, seed: int, split: Split = "train") -> Tensor:
        """Indices [B] of batch `number`: epochs are permutations, the batch may span two of them."""
        size = self.size(split)
        first = number * batch_size
        places = torch.arange(first, first + batch_size)
        found = torch.empty(batch_size, dtype=torch.long)
        for epoch in (places // size).unique().tolist():
            inside = places // size == epoch
            found[inside] = self._permutation(epoch, seed, size)[places[inside] % size]
        return found

    def _permutation(self, epoch: int, seed: int, size: int) -> Tensor:
        key = (epoch, seed, size)
        if getattr(self, "_cached_key", None) != key:
            generator = torch.Generator().manual_seed((seed << 20) + epoch)
            self._cached = torch.randperm(size, generator=generator)
            self._cached_key = key
        return self._cached

    def _gather(self, name: str, which: Tensor, step: Tensor) -> Tensor:
        per_step = name in self._step_names
        if len(self._shards) == 1:
            source = self._shards[0][name]
            rows = self._row_of[which].to(source.device)
            return source[rows, step.to(source.device)] if per_step else source[rows]
        shard, row = self._shard_of[which], self._row_of[which]
        sample = self._shards[0][name]
        out = sample.new_empty((len(which), *sample.shape[2 if per_step else 1 :]))
        for number in shard.unique().tolist():
            inside = shard == number
            source = self._shards[number][name]
            out[inside] = source[row[inside], step[inside]] if per_step else source[row[inside]]
        return out

    def _verify(self) -> None:
        expected = {s["file"]: s["sha256"] for s in self.meta["shards"]}
        expected["shared.safetensors"] = self.meta["shared_sha256"]
        for name, digest in expected.items():
            path = self.folder / name
            if not path.is_file() or file_sha256(path) != digest:
                raise TrajectoryError(f"{path} is missing or damaged (checksum); record the trajectories again")


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _complete(folder: Path) -> dict[str, Any]:
    """meta.json of a finished folder."""
    if not (folder / "meta.json").is_file():
        raise TrajectoryError(f"{folder} holds no trajectories (no meta.json)")
    meta: dict[str, Any] = read_json(folder / "meta.json")
    if meta.get("kind") != "trajectories" or meta.get("version") != VERSION:
        raise TrajectoryError(f"{folder}/meta.json is not of trajectories, version {VERSION}")
    if not meta["complete"]:
        raise TrajectoryError(f"{folder}: the recording was not finished; run it again, it resumes")
    return meta


def _fill(into: Tensor, parts: Sequence[Tensor]) -> None:
    start = 0
    for part in parts:
        into[start : start + len(part)] = part.to(into.device)
        start += len(part)


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise TrajectoryError(f"{path} cannot be read ({error}); record the trajectories again") from None


def _step_tensors(path: Path) -> frozenset[str]:
    import json

    from safetensors import safe_open

    with safe_open(path, framework="pt") as stream:
        return frozenset(json.loads(stream.metadata()["tritflow"])["step_tensors"])
