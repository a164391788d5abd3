from __future__ import annotations

import pytest
import torch

from tritflow.kernels import tuning
from tritflow.kernels.hopper import why_not_compile
from tritflow.kernels.tuning import Choice
from tritflow.profiling import tune as bench


def test_every_backend_offers_choices():
    labels = [c.label for c in bench.choices("w2a8 int8", ("triton", "scratch", "hopper"))]
    assert len(set(labels)) == len(labels) == 1 + len(bench.TILES) + len(bench.HOPPER)
    assert "scratch" in labels
    sixteen = list(bench.choices(tuning.W2A16, ("triton", "hopper")))
    assert sixteen
    tiles = [c.config for c in sixteen if c.backend == "triton"]
    assert tiles
    assert all(config["BLOCK_M"] * config["BLOCK_N"] <= 128 * 128 for config in tiles)
    assert [c.config for c in sixteen if c.backend == "hopper"] == bench.HOPPER_16


def test_every_configuration_tried_on_hopper_exists():
    if reason := why_not_compile():
        pytest.skip(reason)
    from tritflow.kernels.hopper.launch import Config

    assert len({Config(**config) for config in bench.HOPPER}) == len(bench.HOPPER)
    assert len({Config(**config) for config in bench.HOPPER_16}) == len(bench.HOPPER_16)


def test_the_fastest_choice_that_ran_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU 9000")
    monkeypatch.setattr(bench.results, "provenance", lambda device: {"versions": {"torch": "2.11", "numpy": "2"}})
    monkeypatch.setattr(bench, "PRODUCTS", [(64, 128), (32, 128)])
    tiles = {"BLOCK_M": 128}

    def product(name, m, n, k, backends, milliseconds, broken):
        assert broken == {"hopper lag=1": "hangs"}
        if n == 32:
            return {"triton": {"error": "no"}}
        times = {"p20": 1.0, "p80": 9.0}
        return {
            "scratch": {"choice": Choice("scratch"), "p50": 5.0, **times},
            "triton": {"choice": Choice("triton", tiles), "p50": 4.0, **times},
            "hopper": {"error": "wrong: relative error 0.3"},
        }

    monkeypatch.setattr(bench, "tune_product", product)
    monkeypatch.setattr(bench, "precompile", lambda names, *_: {name: {"hopper lag=1": "hangs"} for name in names})
    lines = []
    path = tmp_path / "tuned.json"
    found = bench.tune(path, names=("w2a8 int8",), tokens=(512,), parts=("products",), say=lines.append)
    assert tuning.read(path) == {"w2a8 int8 512x64x128": Choice("triton", tiles, 4.0)}
    assert '"numpy"' not in path.read_text()
    assert found["w2a8 int8 512x64x128"]["triton"] == {"p20": 1.0, "p50": 4.0, "p80": 9.0}
    assert found["w2a8 int8 512x32x128"] == {"triton": {"error": "no"}}
    assert "left out: hangs" in lines[0]
    assert "nothing ran" in lines[2]
    assert bench.tune(path, seconds=-1.0, say=lines.append) == {}


def test_a_part_writes_the_fastest_of_each_entry(tmp_path, monkeypatch):
    from tritflow.profiling import tune_passes
    from tritflow.profiling.timing import Candidate

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Test GPU 9000")
    monkeypatch.setattr(bench.results, "provenance", lambda device: {"versions": {"torch": "2.11"}})
    options = [(c, Candidate(c.label, lambda i: None, 1)) for c in (Choice("hopper", {"rows": 16}), Choice("triton"))]

    def entries(part, seconds, say):
        assert part == "few rows"
        return [("w2a16 1x64x128", lambda: options), ("w2a16 1x32x128", list)]

    def times(candidates, **_):
        return {c.name: {"p20": 1.0, "p50": 5.0 - i, "p80": 9.0} for i, c in enumerate(candidates)}

    monkeypatch.setattr(tune_passes, "targets", entries)
    monkeypatch.setattr(tune_passes, "graph_times", times)
    lines = []
    path = tmp_path / "tuned.json"
    found = bench.tune(path, parts=("few rows",), say=lines.append)
    assert tuning.read(path) == {"w2a16 1x64x128": Choice("triton", {}, 4.0)}
    assert found["w2a16 1x64x128"]["hopper rows=16"]["p50"] == 5.0
    assert "nothing ran" in lines[1]


def test_parts_are_those_of_the_command():
    from tritflow.cli.bench import kernels as command
    from tritflow.profiling import kernels, tune_passes

    assert command._TUNED == bench.PARTS == (*tune_passes.PARTS, "products")
    assert command._PARTS == kernels.PARTS
