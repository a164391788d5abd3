"""The streaming writer: the same bytes whatever happens on the way, and nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_ternary import CONFIG, folder_bytes, tiny_tensors, write_tiny

import forked
from tritflow.config import TernaryConfig
from tritflow.formats import atomic
from tritflow.formats.checkpoint import (
    CheckpointError,
    Digest,
    DiskFullError,
    TransformerWriter,
    verify_folder,
    write_folder,
)
from tritflow.formats.packing import unpack
from tritflow.formats.writer import PARTS

SHARDS = 9000


@pytest.mark.parametrize("packing", ["2bit", "base3"])
@pytest.mark.parametrize("column_scale", [False, True])
@pytest.mark.parametrize("shard", [1 << 30, SHARDS])
def test_round_trip(tmp_path: Path, packing: Any, column_scale: bool, shard: int) -> None:
    ternary = TernaryConfig(packing=packing, column_scale=column_scale)
    digest = write_tiny(tmp_path / "m", ternary, shard)
    linears, dense = tiny_tensors(ternary)
    folder = verify_folder(tmp_path / "m")
    assert folder.ternary == ternary
    assert folder.config == CONFIG
    assert folder.digest == digest
    assert set(folder.linears) == set(linears)
    for name, arguments in linears.items():
        stored = folder.linear(name)
        assert torch.equal(unpack(stored.packed, stored.in_features, packing), arguments["trits"])
        assert torch.equal(stored.weight_scale, arguments["weight_scale"])
        assert torch.equal(stored.bias, arguments["bias"])
        assert (stored.input_scale is not None) == column_scale
    assert set(folder.dense_names()) == set(dense)
    assert all(torch.equal(folder.tensor(n), t) for n, t in dense.items())
    assert not any(p.name.startswith(".") for p in (tmp_path / "m").iterdir())


def test_plain_safetensors_reads_the_shards_and_the_digest_follows_from_them(tmp_path: Path) -> None:
    expected = write_tiny(tmp_path / "m", max_shard_bytes=SHARDS)
    index = json.loads((tmp_path / "m" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    digest, total = Digest(), 0
    for file in sorted(set(index["weight_map"].values()), reverse=True):
        tensors = load_file(tmp_path / "m" / file)
        assert {n for n, f in index["weight_map"].items() if f == file} == set(tensors)
        for name, tensor in tensors.items():
            digest.add(name, tensor)
            total += tensor.nbytes
            # Aligned in the file, as the reference library needs for a view without a copy.
            assert tensor.data_ptr() % tensor.element_size() == 0
    assert digest.hexdigest() == expected
    assert index["metadata"]["total_size"] == total


def test_shards_respect_the_limit_and_keep_modules_whole(tmp_path: Path) -> None:
    write_tiny(tmp_path / "m", max_shard_bytes=SHARDS)
    folder = verify_folder(tmp_path / "m")
    assert len(folder.files) > 5
    for file in folder.files:
        data = sum(e.nbytes for e in file.entries.values())
        modules = {n.rpartition(".")[0] for n in file.entries}
        assert data <= SHARDS or len(modules) == 1
    for name in folder.linears:
        assert folder.file(f"{name}.weight") is folder.file(f"{name}.weight_scale") is folder.file(f"{name}.bias")


def test_the_same_bytes_in_whatever_order_modules_arrive(tmp_path: Path) -> None:
    write_tiny(tmp_path / "a", max_shard_bytes=SHARDS)
    linears, dense = tiny_tensors(TernaryConfig())
    writer = TransformerWriter(tmp_path / "b", TernaryConfig(), "other order", SHARDS)
    jobs = [*linears, *dense]
    random.Random(3).shuffle(jobs)
    for name in jobs:
        if name in linears:
            writer.add_linear(name, **linears[name])
        else:
            writer.add_dense(name, dense[name])
    writer.finish(CONFIG)
    write_folder(tmp_path / "c", CONFIG, TernaryConfig(), linears, dense, SHARDS)
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b") == folder_bytes(tmp_path / "c")


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[3])
from tiny_ternary import write_tiny
print("go", flush=True)
write_tiny(Path(sys.argv[1]), max_shard_bytes=int(sys.argv[2]))
"""


def _start(out: Path) -> forked.Forked:
    child = forked.start(["-c", _CHILD, out, SHARDS, Path(__file__).parent])
    while child.stdout != "go\n":
        assert child.poll() is None, child.stderr
    return child


def test_killed_and_resumed_gives_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL in the middle of a real process, three times over, then one run to the end."""
    write_tiny(tmp_path / "unbroken", max_shard_bytes=SHARDS)
    out, kills = tmp_path / "killed", 0
    for parts in (2, 21, 47):
        child = _start(out)
        while child.poll() is None and len(list(out.glob(f"{PARTS}/*.safetensors"))) < parts:
            pass
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    write_tiny(out, max_shard_bytes=SHARDS)
    assert kills
    assert folder_bytes(out) == folder_bytes(tmp_path / "unbroken")


class _Killed(BaseException):
    pass


def _die_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """Stop dead (no clean-up runs: the finally blocks' unlink is disarmed too) at the n-th touch of the disk."""
    left = [calls]
    real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}

    def touch(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if left[0] <= 0:
                raise _Killed
            left[0] -= 1
            return real[name](*args, **kwargs)

        return call

    for name in real:
        monkeypatch.setattr(os, name, touch(name))


def test_stopped_at_every_touch_of_the_disk_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rename, sync and removal is a place to die; between any two the folder must resume to the same bytes."""
    write_tiny(tmp_path / "unbroken", max_shard_bytes=30_000)
    expected = folder_bytes(tmp_path / "unbroken")
    points, survived = 0, False
    step = 1
    while not survived:
        out = tmp_path / f"stopped{step}"
        with monkeypatch.context() as patch:
            _die_after(patch, step)
            try:
                write_tiny(out, max_shard_bytes=30_000)
                survived = True
            except _Killed:
                points += 1
        if not survived and (out / "config.json").exists():
            assert verify_folder_or_unfinished(out)
        write_tiny(out, max_shard_bytes=30_000)
        assert folder_bytes(out) == expected, step
        step += 1 if step > 55 else 7  # `finish` at every point, the many equal parts by sampling
    assert points > 40


def verify_folder_or_unfinished(out: Path) -> bool:
    try:
        verify_folder(out)
    except CheckpointError as error:
        return "unfinished" in str(error)
    return True


def test_an_unfinished_folder_says_so(tmp_path: Path) -> None:
    writer = TransformerWriter(tmp_path / "m", TernaryConfig(), "job")
    writer.add_dense("x_embedder.weight", torch.zeros(2, 2))
    with pytest.raises(CheckpointError, match="unfinished"):
        verify_folder(tmp_path / "m")
    with pytest.raises(CheckpointError, match="unfinished job with another source"):
        TransformerWriter(tmp_path / "m", TernaryConfig(), "another job")
    with pytest.raises(CheckpointError, match="unfinished job with another source"):
        TransformerWriter(tmp_path / "m", TernaryConfig(packing="base3"), "job")
    assert "x_embedder.weight" in TransformerWriter(tmp_path / "m", TernaryConfig(), "job")


def test_a_part_damaged_by_a_power_cut_is_made_again(tmp_path: Path) -> None:
    linears, _ = tiny_tensors(TernaryConfig())
    name = next(iter(linears))
    writer = TransformerWriter(tmp_path / "m", TernaryConfig())
    writer.add_linear(name, **linears[name])
    part = tmp_path / "m" / PARTS / f"{name}.safetensors"
    for damage in (lambda b: b[: len(b) // 2], lambda b: b[:-5] + b"\xff" + b[-4:], lambda b: b""):
        whole = part.read_bytes()
        part.write_bytes(damage(whole))
        writer = TransformerWriter(tmp_path / "m", TernaryConfig())
        assert name not in writer
        writer.add_linear(name, **linears[name])
        assert part.read_bytes() == whole


def test_a_part_damaged_before_the_join_is_noticed(tmp_path: Path) -> None:
    writer = TransformerWriter(tmp_path / "m", TernaryConfig())
    writer.add_dense("x", torch.zeros(100))
    part = tmp_path / "m" / PARTS / "x.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"\1")
    with pytest.raises(CheckpointError, match="was damaged while it lay on the disk"):
        writer.finish(CONFIG)
    assert not list((tmp_path / "m").glob("diffusion*"))
    assert not (tmp_path / "m" / "config.json").exists()


class _FullDisk:
    """A file on a disk with `room` bytes left."""

    def __init__(self, file: Any, budget: list[int]) -> None:
        self._file, self._budget = file, budget

    def write(self, data: Any) -> int:
        self._budget[0] -= len(data)
        if self._budget[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _FullDisk:
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.close()


@pytest.mark.parametrize("room", [0, 500, 30_000, 90_000, 120_000, 170_000])
def test_full_disk_is_one_line_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    write_tiny(tmp_path / "unbroken", max_shard_bytes=SHARDS)
    budget = [room]
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "open", lambda *a: _FullDisk(open(*a), budget), raising=False)  # noqa: SIM115
        with pytest.raises(DiskFullError, match="the disk is full while writing") as caught:
            write_tiny(tmp_path / "m", max_shard_bytes=SHARDS)
    assert "\n" not in str(caught.value)
    assert caught.value.errno == errno.ENOSPC
    assert not list((tmp_path / "m").rglob("*.tmp"))
    assert not (tmp_path / "m" / "config.json").exists()
    write_tiny(tmp_path / "m", max_shard_bytes=SHARDS)
    assert folder_bytes(tmp_path / "m") == folder_bytes(tmp_path / "unbroken")


def test_a_real_full_disk_during_sync_and_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, full)
            with pytest.raises(DiskFullError):
                write_tiny(tmp_path / "m")
        assert not list((tmp_path / "m").rglob("*.tmp"))
    write_tiny(tmp_path / "m")
    verify_folder(tmp_path / "m")


def test_finished_folders_and_foreign_ones(tmp_path: Path) -> None:
    digest = write_tiny(tmp_path / "m")
    before = folder_bytes(tmp_path / "m")
    again = TransformerWriter(tmp_path / "m", TernaryConfig(), "test", 1 << 30)
    assert again.finished
    assert "anything" in again
    assert again.finish(CONFIG) == digest
    with pytest.raises(CheckpointError, match="is finished"):
        again.add_dense("x", torch.zeros(1))
    assert folder_bytes(tmp_path / "m") == before
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(CheckpointError, match="already holds a model that is not ternary"):
        TransformerWriter(tmp_path / "dense", TernaryConfig())
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        TransformerWriter(tmp_path / "file", TernaryConfig())


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    writer = TransformerWriter(tmp_path / "m", TernaryConfig())
    trits = torch.zeros(4, 6, dtype=torch.int8)
    with pytest.raises(CheckpointError, match="weight_scale must have shape"):
        writer.add_linear("a", trits, torch.ones(5))
    with pytest.raises(CheckpointError, match="is not finite"):
        writer.add_linear("a", trits, torch.tensor([1.0, float("nan"), 1, 1]))
    with pytest.raises(CheckpointError, match="input_scale must be given exactly when"):
        writer.add_linear("a", trits, torch.ones(4), input_scale=torch.ones(6))
    with pytest.raises(CheckpointError, match="no module name"):
        writer.add_linear("../a", trits, torch.ones(4))
    with pytest.raises(CheckpointError, match="nothing was added"):
        writer.finish(CONFIG)
    writer.add_linear("a", trits, torch.ones(4))
    writer.add_dense("a.weight", torch.ones(4))
    with pytest.raises(CheckpointError, match="was added by"):
        writer.finish(CONFIG)


def test_memory_stays_at_one_tensor(tmp_path: Path) -> None:
    """Twelve tensors of 8 MiB written, joined and verified: the process grows by far less than their sum."""
    code = """
import resource, sys, torch
from pathlib import Path
from tritflow.config import TernaryConfig
from tritflow.formats.checkpoint import TransformerWriter
from tritflow.formats.integrity import stored_sha256
from tritflow.formats.safetensors_file import SafetensorsFile
writer = TransformerWriter(Path(sys.argv[1]), TernaryConfig(), max_shard_bytes=1 << 40)
writer.add_dense("warm.up", torch.zeros(4 << 20, dtype=torch.bfloat16))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for i in range(12):
    writer.add_dense(f"t.{i}", torch.full((4 << 20,), i, dtype=torch.bfloat16))
writer.finish({"_class_name": "Other"})
file = SafetensorsFile(Path(sys.argv[1]) / "diffusion_pytorch_model.safetensors")
for name in file.entries:
    stored_sha256(file, name), file.tensor(name)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    out = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert int(out.stdout) < 40 * 1024  # KiB; the tensors are 104 MiB together
