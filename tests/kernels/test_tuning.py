from __future__ import annotations

import json

import pytest
import torch

from tritflow.kernels import backends, tuning
from tritflow.kernels.tuning import Choice, TuningError

CUDA = torch.device("cuda", 0)
TILES = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 4}


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """A GPU by the name of 'Test GPU 9000', nothing tuned, and a cache folder of its own."""
    monkeypatch.setenv("TRITFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "FOLDER", tmp_path / "package")
    monkeypatch.setattr(tuning, "_device_name", lambda index: "Test GPU 9000")
    tuning.forget()
    yield tmp_path
    tuning.forget()


def _write(folder, entries):
    tuning.write(folder / "test-gpu-9000.json", "Test GPU 9000", {"triton": "3.6.0"}, entries)


def test_the_nearest_size_within_a_factor_of_two(gpu):
    assert tuning.lookup(CUDA, "w2a8 int8", 4608, 9216, 3072) is None
    small, large = Choice("triton", TILES, 25.0), Choice("scratch", {}, 190.0)
    _write(tuning.cache_folder(), {"w2a8 int8 512x9216x3072": small, "w2a8 int8 4608x9216x3072": large})

    def found(m, n=9216, k=3072, name="w2a8 int8", device=CUDA):
        return tuning.lookup(device, name, m, n, k)

    assert found(4608) == found(4096) == found(9216) == large
    assert found(512) == found(256) == found(1024) == small
    assert found(100) is found(9217) is found(0) is None
    assert found(512, n=3072) is found(512, name="w2a16") is found(512, device=torch.device("cpu")) is None


def test_the_users_own_measurements_win_and_are_added_to(gpu):
    _write(gpu / "package", {"w2a16 4608x64x128": Choice("scratch"), "w2a16 32x64x128": Choice("triton")})
    assert tuning.lookup(CUDA, "w2a16", 4608, 64, 128).backend == "scratch"
    _write(tuning.cache_folder(), {"w2a16 4608x64x128": Choice("triton", TILES)})
    _write(tuning.cache_folder(), {"w2a16 1x64x128": Choice("triton")})
    assert tuning.lookup(CUDA, "w2a16", 4608, 64, 128) == Choice("triton", TILES)
    assert tuning.lookup(CUDA, "w2a16", 32, 64, 128).backend == "triton"
    assert tuning.lookup(CUDA, "w2a16", 1, 64, 128) is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not readable"),
        ("[]", "no file of tuned choices"),
        ('{"schema": 2, "entries": {}}', "schema 1"),
        ('{"schema": 1, "entries": {"w2a16 1x1x1": {"tiles": 3}}}', "no choice"),
        ('{"schema": 1, "entries": {"w2a16 large": {"backend": "triton"}}}', "names no product"),
    ],
)
def test_broken_files_are_named(gpu, text, message):
    path = tuning.cache_folder() / "test-gpu-9000.json"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(TuningError, match=message):
        tuning.lookup(CUDA, "w2a16", 1, 1, 1)


def test_auto_takes_the_tuned_backend_first(gpu, problem, monkeypatch):
    _write(tuning.cache_folder(), {"w2a8 int8 4x8x128": Choice("scratch"), "w2a16 4x8x128": Choice("reference")})
    p = problem(4, 8, 128)
    q = torch.zeros(4, 128, dtype=torch.int8)
    asked = []

    def usable(name, device):
        asked.append(name)
        return "not here"

    monkeypatch.setattr(backends, "_usable", usable)
    linear = (p["weight"], p["weight_scale"], None, None)
    calls = {
        "w2a8_matmul": (q, torch.ones(4), p["weight"], p["weight_scale"], torch.bfloat16),
        "w2a8_linear": (p["x"], *linear, "int8"),
        "w2a16_linear": (p["x"], *linear),
        "quantize_activation": (p["x"], None, "int8"),
    }
    first = {}
    for op, args in calls.items():
        asked.clear()
        with pytest.raises(backends.BackendError):
            backends.select(op, "auto", CUDA, args)
        first[op] = asked[0]
    assert first == {
        "w2a8_matmul": "scratch",
        "w2a8_linear": "scratch",
        "w2a16_linear": "reference",
        "quantize_activation": "hopper",
    }


def test_shipped_files_are_sound():
    for path in tuning.FOLDER.glob("*.json"):
        entries = tuning.read(path)
        data = json.loads(path.read_text())
        assert path.stem == tuning.slug(data["device"])
        assert entries
        for name, choice in entries.items():
            assert choice.backend in backends.NAMES, name
            assert choice.microseconds > 0, name


def test_a_tuned_attention_is_taken_where_it_was_measured(gpu):
    from types import SimpleNamespace

    device = torch.device("cuda", 0)
    q = SimpleNamespace(shape=(1, 512, 24, 128))
    context = SimpleNamespace(shape=(1, 64, 24, 128))
    _write(tuning.cache_folder(), {tuning.entry(tuning.attention("int8"), 512, 24, 128): Choice("hopper")})
    assert tuning.preferred("attention", device, (q, q, q, "int8", None)) == ("hopper",)
    assert tuning.preferred("attention", device, (q, q, q, "float8_e4m3fn", None)) == ()
    normed = (q, q, q, *(None,) * 4, context, None, None, None, None, 1e-6, "int8", None)
    assert tuning.preferred("normed_attention", device, normed) == ("hopper",)
    longer = SimpleNamespace(shape=(1, 1000, 24, 128))
    normed = (longer, longer, longer, *normed[3:])
    assert tuning.preferred("normed_attention", device, normed) == ()  # 1,064 tokens are too far from 512
