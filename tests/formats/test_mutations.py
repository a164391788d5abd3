"""Thousands of damaged checkpoints: each is one clear line, or still the very same model. Never anything else."""

from __future__ import annotations

import copy
import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_ternary import write_tiny

from tritflow.config import TernaryConfig
from tritflow.formats.checkpoint import CheckpointError, TernaryFolder, verify_folder
from tritflow.formats.integrity import architecture

WEIGHTS = "diffusion_pytorch_model.safetensors"
SLOWEST = 5.0
"""Seconds one mutation may take: far above the usual 10 ms, far below a hang."""

Mutation = tuple[str, str, bytes]  # what was done, file name, its new bytes


class Original:
    """A sound folder, and what makes another folder logically the same."""

    def __init__(self, path: Path, **arguments: Any) -> None:
        write_tiny(path, **arguments)
        self.path = path
        folder = verify_folder(path)
        self.tensors = {n: folder.tensor(n) for n in folder.names()}
        self.meaning = self._meaning(folder)
        self.files = {p.name: p.read_bytes() for p in path.iterdir()}

    @staticmethod
    def _meaning(folder: TernaryFolder) -> tuple[Any, ...]:
        t = folder.ternary
        modules = {n.rpartition(".")[0] for n in folder.names()}
        return (
            (t.version, t.mode, t.activation_dtype, t.backend, t.packing, t.column_scale),
            {m: t.matches(m) for m in modules},
            folder.linears,
        )

    def same(self, folder: TernaryFolder) -> bool:
        written = architecture(json.loads(self.files["config.json"]))
        found = architecture(folder.config)
        return (
            self._meaning(folder) == self.meaning
            and all(found[k] == v for k, v in written.items())
            and set(folder.names()) == set(self.tensors)
            and all(
                folder.entry(n).shape == tuple(t.shape)
                and torch.equal(folder.tensor(n).view(-1).view(torch.uint8), t.view(-1).view(torch.uint8))
                for n, t in self.tensors.items()
            )
        )

    def outcomes(self, mutations: Iterator[Mutation], scratch: Path) -> dict[str, int]:
        """Apply each mutation to a copy of the folder. Returns how many were refused and how many were the same."""
        shutil.copytree(self.path, scratch)
        count = {"refused": 0, "same": 0}
        for what, name, data in mutations:
            if data == self.files[name]:
                continue
            (scratch / name).write_bytes(data)
            start = time.perf_counter()
            try:
                folder = verify_folder(scratch)
            except CheckpointError as error:
                message = str(error)
                count["refused"] += 1
            else:
                assert self.same(folder), f"silently wrong: {what} of {name}"
                message = "sound enough to load"
                count["same"] += 1
            assert "\n" not in message, what
            assert 20 <= len(message) < 900, what
            assert time.perf_counter() - start < SLOWEST, what
            (scratch / name).write_bytes(self.files[name])
        return count


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Original:
    return Original(tmp_path_factory.mktemp("whole") / "m")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Original:
    ternary = TernaryConfig(packing="base3", column_scale=True)
    return Original(tmp_path_factory.mktemp("sharded") / "m", ternary=ternary, max_shard_bytes=30_000)


def flips(name: str, data: bytes, count: int, seed: int, start: int = 0, stop: int | None = None) -> Iterator[Mutation]:
    chance = random.Random(seed)
    for _ in range(count):
        position, bit = chance.randrange(start, stop or len(data)), chance.randrange(8)
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        yield f"bit {bit} of byte {position} flipped", name, bytes(changed)


def header_size(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def with_header(data: bytes, header: Any) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[header_size(data) :]


def read_header(data: bytes) -> dict[str, Any]:
    return json.loads(data[8 : header_size(data)])


def test_bits_flipped_in_data(whole: Original, tmp_path: Path) -> None:
    data = whole.files[WEIGHTS]
    count = whole.outcomes(flips(WEIGHTS, data, 600, 1, header_size(data)), tmp_path / "x")
    assert count == {"refused": 600, "same": 0}


def test_bits_flipped_in_headers(whole: Original, tmp_path: Path) -> None:
    data = whole.files[WEIGHTS]
    count = whole.outcomes(flips(WEIGHTS, data, 1000, 2, 0, header_size(data)), tmp_path / "x")
    assert sum(count.values()) == 1000
    assert count["refused"] > 600
    every_length_bit = (
        (
            f"length bit {bit}",
            WEIGHTS,
            (int.from_bytes(data[:8], "little") ^ 1 << bit).to_bytes(8, "little") + data[8:],
        )
        for bit in range(64)
    )
    assert whole.outcomes(every_length_bit, tmp_path / "y") == {"refused": 64, "same": 0}


def test_truncated_and_extended_files(whole: Original, tmp_path: Path) -> None:
    def cuts() -> Iterator[Mutation]:
        chance = random.Random(3)
        for name, data in whole.files.items():
            points = {*range(20), len(data) - 1, len(data) - 2, *(chance.randrange(len(data)) for _ in range(120))}
            if name == WEIGHTS:
                points |= {header_size(data) + d for d in (-1, 0, 1)}
            for point in sorted(points):
                yield f"cut to {point} bytes", name, data[:point]
        data = whole.files[WEIGHTS]
        for extra in (b"\0", b"\0" * 8, data[-100:]):
            yield "extended", WEIGHTS, data + extra
            yield "grown at the front", WEIGHTS, extra + data

    count = whole.outcomes(cuts(), tmp_path / "x")
    # Only the newline at the end of config.json can go.
    assert count["same"] <= 1
    assert count["refused"] > 280


def test_bits_flipped_in_config_and_index(whole: Original, sharded: Original, tmp_path: Path) -> None:
    data = whole.files["config.json"]
    count = whole.outcomes(flips("config.json", data, 400, 4), tmp_path / "x")
    assert sum(count.values()) == 400
    assert count["refused"] > 300
    index = f"{WEIGHTS}.index.json"
    count = sharded.outcomes(flips(index, sharded.files[index], 200, 5), tmp_path / "y")
    assert sum(count.values()) == 200
    assert count["refused"] > 100


def test_bits_flipped_in_shards(sharded: Original, tmp_path: Path) -> None:
    def everywhere() -> Iterator[Mutation]:
        for i, (name, data) in enumerate(sharded.files.items()):
            if name.endswith(".safetensors"):
                yield from flips(name, data, 300, 100 + i)

    count = sharded.outcomes(everywhere(), tmp_path / "x")
    assert count["refused"] >= 0.9 * sum(count.values())
    assert sum(count.values()) >= 600


def _edit(header: dict[str, Any], chance: random.Random) -> str:
    """One well-formed but wrong change of a header."""
    names = [n for n in header if n != "__metadata__"]
    a, b = chance.sample(names, 2)
    meta = header["__metadata__"]

    def nested(key: str, change: Callable[[dict[str, Any]], None]) -> None:
        value = json.loads(meta[key])
        change(value)
        meta[key] = json.dumps(value)

    def swap(key: str) -> None:
        header[a][key], header[b][key] = header[b][key], header[a][key]

    def shift_rows() -> None:
        shape = header[a]["shape"]
        header[a]["shape"] = shape[::-1] if len(shape) == 2 else [1, *shape]

    linears = list(json.loads(meta["tritflow.linears"]))
    linear = chance.choice(linears)
    edits: dict[str, Callable[[], Any]] = {
        "offsets swapped": lambda: swap("data_offsets"),
        "tensors swapped": lambda: header.update({a: header[b], b: header[a]}),
        "renamed": lambda: header.update({a + "x": header.pop(a)}),
        "removed": lambda: header.pop(a),
        "dtype": lambda: header[a].update(dtype=chance.choice(["F16", "F32", "I16", "U8", "X9", 3, None])),
        "shape": lambda: header[a].update(
            shape=chance.choice([[], [0], [-1, 4], [1 << 62, 1 << 62], "x", [1.5], [True]])
        ),
        "shape turned": shift_rows,
        "offset": lambda: header[a]["data_offsets"].__setitem__(chance.randrange(2), chance.randrange(-5, 99999)),
        "extra key": lambda: header[a].update(extra=1),
        "version": lambda: meta.update({"tritflow.version": chance.choice(["2", "0", "-1", "99", "x", "", "1.0"])}),
        "one checksum": lambda: nested("tritflow.checksums", lambda v: v.update({a: "0" * 32})),
        "checksum swapped": lambda: nested("tritflow.checksums", lambda v: v.update({a: v[b]})),
        "checksum gone": lambda: nested("tritflow.checksums", lambda v: v.pop(a)),
        "checksum malformed": lambda: nested(
            "tritflow.checksums", lambda v: v.update({a: chance.choice([1, "x", None])})
        ),
        "in_features": lambda: nested(
            "tritflow.linears", lambda v: v.update({linear: v[linear] + chance.choice([-1, 1])})
        ),
        "in_features type": lambda: nested(
            "tritflow.linears", lambda v: v.update({linear: chance.choice(["24", 0, True])})
        ),
        "linear added": lambda: nested("tritflow.linears", lambda v: v.update({"x_embedder": 8})),
        "architecture": lambda: nested("tritflow.architecture", lambda v: v.update(num_attention_heads=4)),
        "metadata type": lambda: meta.update({"tritflow.checksums": "[]"}),
        "unknown key": lambda: meta.update({"tritflow.groups": "{}"}),
        "not text": lambda: meta.update({"x": 1}),
    }
    what = chance.choice(list(edits))
    edits[what]()
    return what


def test_well_formed_but_wrong_headers(whole: Original, tmp_path: Path) -> None:
    data = whole.files[WEIGHTS]
    header = read_header(data)

    def edited() -> Iterator[Mutation]:
        chance = random.Random(6)
        for _ in range(700):
            changed = copy.deepcopy(header)
            what = _edit(changed, chance)
            if changed != header:
                yield what, WEIGHTS, with_header(data, changed)

    count = whole.outcomes(edited(), tmp_path / "x")
    assert count["same"] == 0
    assert count["refused"] > 600


def test_contents_exchanged_between_tensors_of_one_shape(whole: Original, tmp_path: Path) -> None:
    """Every byte is a legal value where it lands; only the names tell."""
    data, header = whole.files[WEIGHTS], read_header(whole.files[WEIGHTS])
    start = header_size(data)
    header.pop("__metadata__")

    def exchanges() -> Iterator[Mutation]:
        chance = random.Random(8)
        for _ in range(150):
            a = chance.choice(list(header))
            alike = [
                n for n, e in header.items() if e["shape"] == header[a]["shape"] and e["dtype"] == header[a]["dtype"]
            ]
            (a0, a1), (b0, b1) = header[a]["data_offsets"], header[chance.choice(alike)]["data_offsets"]
            changed = bytearray(data)
            changed[start + a0 : start + a1], changed[start + b0 : start + b1] = (
                data[start + b0 : start + b1],
                data[start + a0 : start + a1],
            )
            yield "contents exchanged", WEIGHTS, bytes(changed)

    count = whole.outcomes(exchanges(), tmp_path / "x")
    assert count["same"] == 0
    assert count["refused"] > 80


def test_config_values_changed(whole: Original, tmp_path: Path) -> None:
    config = json.loads(whole.files["config.json"])
    values = [
        0,
        1,
        -1,
        2,
        13,
        1 << 70,
        0.5,
        None,
        True,
        "",
        "x",
        [],
        {},
        [4, 4, 4],
        [2, 2, 8],
        [6, 6, 0],
        "w2a8",
        "base3",
    ]

    def changed() -> Iterator[Mutation]:
        for scope in ("", "quantization_config"):
            for key in config[scope] if scope else config:
                for value in [*values, "REMOVE"]:
                    new = copy.deepcopy(config)
                    target = new[scope] if scope else new
                    if value == "REMOVE":
                        del target[key]
                    else:
                        target[key] = value
                    # Settings that a user may choose at will make another, but never a wrong, model.
                    if key in ("mode", "backend", "activation_dtype") or key.startswith("_diffusers"):
                        continue
                    yield f"{key} = {value!r}", "config.json", json.dumps(new).encode()
        yield "an array", "config.json", b"[]"
        yield "deeply nested", "config.json", b'{"a":' * 100_000 + b"1" + b"}" * 100_000
        yield "a key twice", "config.json", b'{"_class_name": "x", ' + whole.files["config.json"][1:]
        yield (
            "not a number",
            "config.json",
            whole.files["config.json"].replace(b'"in_channels": 8', b'"in_channels": NaN'),
        )

    count = whole.outcomes(changed(), tmp_path / "x")
    assert count["refused"] > 300
    # null out_channels (its default) and `skip`, `column_scale` at their defaults are the same model.
    assert count["same"] < 20


def test_versions_to_come_name_the_cure(whole: Original, tmp_path: Path) -> None:
    shutil.copytree(whole.path, tmp_path / "a")
    config = json.loads(whole.files["config.json"])
    config["quantization_config"]["version"] = 2
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"format version 2 is newer than this tritflow.*upgrade tritflow"):
        verify_folder(tmp_path / "a")


def test_the_damaged_tensor_is_named(whole: Original, tmp_path: Path) -> None:
    shutil.copytree(whole.path, tmp_path / "m")
    data, header = whole.files[WEIGHTS], read_header(whole.files[WEIGHTS])
    for name in (
        "transformer_blocks.0.attn.to_q.weight",
        "x_embedder.bias",
        "single_transformer_blocks.1.proj_out.weight_scale",
    ):
        changed = bytearray(data)
        changed[header_size(data) + header[name]["data_offsets"][0]] ^= 1
        (tmp_path / "m" / WEIGHTS).write_bytes(changed)
        with pytest.raises(CheckpointError, match=f"tensor '{name}' does not match its checksum"):
            verify_folder(tmp_path / "m")
        with pytest.raises(CheckpointError, match=f"tensor '{name}' does not match its checksum"):
            TernaryFolder(tmp_path / "m").tensor(name)


def test_missing_and_exchanged_files(whole: Original, sharded: Original, tmp_path: Path) -> None:
    for name in whole.files:
        shutil.copytree(whole.path, tmp_path / "a")
        (tmp_path / "a" / name).unlink()
        with pytest.raises(CheckpointError):
            verify_folder(tmp_path / "a")
        shutil.rmtree(tmp_path / "a")
    for name in sharded.files:
        shutil.copytree(sharded.path, tmp_path / "a")
        (tmp_path / "a" / name).unlink()
        with pytest.raises(CheckpointError):
            verify_folder(tmp_path / "a")
        (tmp_path / "a" / name).mkdir()
        with pytest.raises(CheckpointError):
            verify_folder(tmp_path / "a")
        shutil.rmtree(tmp_path / "a")
    write_tiny(tmp_path / "other", seed=1)
    shutil.copytree(whole.path, tmp_path / "mixed")
    shutil.copy(tmp_path / "other" / WEIGHTS, tmp_path / "mixed" / WEIGHTS)
    with pytest.raises(CheckpointError, match="do not match the digest"):
        verify_folder(tmp_path / "mixed")


def test_an_index_cannot_reach_outside_its_folder(sharded: Original, tmp_path: Path) -> None:
    shutil.copytree(sharded.path, tmp_path / "m")
    index = tmp_path / "m" / f"{WEIGHTS}.index.json"
    good = json.loads(index.read_text())
    for evil in ("../m/x.safetensors", "/etc/passwd", "a/b.safetensors", "", "..", 7, None, "model.bin", "x\0y"):
        bad = copy.deepcopy(good)
        bad["weight_map"][next(iter(bad["weight_map"]))] = evil
        index.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError):
            verify_folder(tmp_path / "m")


def test_harmless_rewriting_loads_equal(whole: Original, tmp_path: Path) -> None:
    data = whole.files[WEIGHTS]
    header = read_header(data)
    spaced = json.dumps(header, indent=1).encode()
    config = json.loads(whole.files["config.json"])
    mutations = [
        ("white space", WEIGHTS, len(spaced).to_bytes(8, "little") + spaced + data[header_size(data) :]),
        ("keys in another order", WEIGHTS, with_header(data, dict(reversed(header.items())))),
        ("config in one line", "config.json", json.dumps(config).encode()),
        ("another diffusers", "config.json", json.dumps({**config, "_diffusers_version": "0.43.0"}).encode()),
    ]
    assert whole.outcomes(iter(mutations), tmp_path / "x") == {"refused": 0, "same": 4}
