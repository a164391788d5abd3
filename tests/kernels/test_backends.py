from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from tritflow.kernels import Backend, BackendError, Kernel, backends, describe, w2a16_linear


def test_importing_kernels_is_lean():
    code = (
        "import sys, torch, tritflow.kernels\n"
        "bad = [m for m in ('triton', 'diffusers', 'transformers') if m in sys.modules]\n"
        "assert not bad, bad\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_describe_names_every_backend():
    lines = describe()
    assert list(lines) == ["hopper", "triton", "scratch", "cpu", "reference"]
    assert lines["reference"].startswith("ready")
    if not torch.cuda.is_available():
        assert lines["triton"].startswith("unavailable")


def test_an_unknown_backend_suggests_the_nearest(problem):
    p = problem(2, 8, 8)
    with pytest.raises(BackendError, match="did you mean 'triton'"):
        w2a16_linear(p["x"], p["weight"], p["weight_scale"], backend="tritn")


@pytest.mark.parametrize("name", ["triton", "scratch", "hopper"])
def test_a_gpu_backend_on_the_cpu_says_what_to_use(problem, name):
    p = problem(2, 8, 8)
    with pytest.raises(BackendError, match=r"cannot be used here.*use backend 'auto'"):
        w2a16_linear(p["x"], p["weight"], p["weight_scale"], backend=name)


def test_auto_takes_the_first_that_supports_the_arguments(problem, monkeypatch):
    p = problem(2, 8, 8)
    calls = []

    def run(x, *rest):
        calls.append(len(x))
        return x.new_zeros(len(x), 8)

    even = Backend("cpu", ("cpu",), lambda device: None, {"w2a16_linear": Kernel(run, lambda x, *_: len(x) % 2 == 0)})
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: even if name == "cpu" else real(name))
    assert not w2a16_linear(p["x"], p["weight"], p["weight_scale"]).any()
    assert w2a16_linear(p["x"][:1], p["weight"], p["weight_scale"]).any()
    assert calls == [2]
    with pytest.raises(BackendError, match="does not compute w2a16_linear"):
        w2a16_linear(p["x"][:1], p["weight"], p["weight_scale"], backend="cpu")


def test_a_backend_that_cannot_be_imported_is_skipped_and_explained(problem, monkeypatch):
    p = problem(2, 8, 8)
    real = backends.load
    monkeypatch.setattr(backends, "load", lambda name: "libgone is missing" if name == "cpu" else real(name))
    assert w2a16_linear(p["x"], p["weight"], p["weight_scale"]).shape == (2, 8)
    with pytest.raises(BackendError, match="libgone is missing"):
        w2a16_linear(p["x"], p["weight"], p["weight_scale"], backend="cpu")
    assert describe()["cpu"] == "unavailable: libgone is missing"


def test_auto_passes_over_what_is_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def first(*args: object) -> str:
        return "first"

    def takes(*args: object) -> bool:
        return True

    shy = backends.Backend("cpu", ("cpu",), lambda _: None, {"op": backends.Kernel(first, takes, automatic=False)})
    plain = backends.Backend("reference", (), lambda _: None, {"op": backends.Kernel(lambda *_: "plain", takes)})
    monkeypatch.setattr(backends, "load", lambda name: {"cpu": shy, "reference": plain}[name])
    device = torch.device("cpu")
    assert backends.select("op", "auto", device, ())() == "plain"
    assert backends.select("op", "cpu", device, ()) is first
