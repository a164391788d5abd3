"""A GPU that cannot run the kernels: the way back is named, and what it costs is measured."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from tritflow.kernels import backends
from tritflow.modules import TernaryLinear
from tritflow.pipelines import fallback

CUDA = torch.device("cuda:0")


@pytest.fixture
def old_gpu(monkeypatch):
    """A Turing card as far as the look-up of backends can tell."""
    reason = "compute capability (7, 5) is below 8.0"

    def usable(name, device):
        return backends.load(name) if name == "reference" else reason

    monkeypatch.setattr(backends, "_usable", usable)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "Tesla T4")
    fallback._line.cache_clear()
    yield reason
    fallback._line.cache_clear()


def test_the_line_names_the_path_and_its_cost(old_gpu, monkeypatch):
    monkeypatch.setattr(fallback, "slowdown", lambda device, mode: {"w2a8": 7.25}[mode])
    model = nn.Sequential(TernaryLinear(128, 128, mode="w2a8"), nn.Linear(4, 4))
    with pytest.warns(fallback.FallbackWarning) as caught:
        fallback.warn_of_fallback(model, CUDA)
    (line,) = (str(w.message) for w in caught)
    assert line.startswith(f"Tesla T4 cannot run tritflow's GPU kernels ({old_gpu}): ternary layers fall back to")
    assert "'reference'" in line
    assert "took 7.2 times as long as a dense bf16 layer" in line
    assert "\n" not in line


def test_nothing_is_said_where_nothing_is_lost(old_gpu, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fallback.warn_of_fallback(nn.Linear(4, 4), CUDA)  # dense
        fallback.warn_of_fallback(TernaryLinear(128, 128, backend="reference"), CUDA)  # asked for by name
        fallback.warn_of_fallback(TernaryLinear(128, 128), torch.device("cpu"))
        monkeypatch.setattr(backends, "_usable", lambda name, device: backends.load("reference"))
        fallback.warn_of_fallback(TernaryLinear(128, 128), CUDA)


def test_the_cost_is_measured(monkeypatch):
    monkeypatch.setattr(fallback, "_TOKENS", 16)
    monkeypatch.setattr(fallback, "_FEATURES", 256)
    assert all(fallback.slowdown(torch.device("cpu"), mode) > 0 for mode in ("w2a16", "w2a8"))
