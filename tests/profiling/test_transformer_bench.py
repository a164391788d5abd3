"""The GPU bench as far as a CPU can run it: contenders are built and called, results are ordered and compared."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_config import CONFIG

from tritflow.pipelines.optimize import is_optimized
from tritflow.profiling import transformer as bench
from tritflow.profiling.dense_fp8 import DenseFp8Linear


@pytest.mark.parametrize("name", ["bf16 eager", "W2A8 int8 stock", "W2A16 optimized, triton", "fp8 compiled"])
def test_contenders_are_built_and_take_the_inputs(name):
    settings = bench.CONTENDERS[name] | {"compiled": False, "backend": "auto"}
    model = bench.build(settings, CONFIG, "cpu")
    assert is_optimized(model) is ("optimized" in name)
    fp8 = [n for n, m in model.named_modules() if isinstance(m, DenseFp8Linear)]
    assert len(fp8) == (12 + 5 if name.startswith("fp8") else 0)  # all block linears but modulation
    inputs = bench.step_inputs(CONFIG, 64, 2, "cpu", torch.bfloat16)
    t = bench.Schedule(4, "cpu").timesteps[1]
    if name.startswith("fp8"):
        return  # its product needs a GPU
    with torch.no_grad():
        out = model(**inputs, timestep=t.expand(2).bfloat16() / 1000)[0]
    assert out.shape == (2, 16, 16)
    assert torch.isfinite(out).all()


def test_a_dense_fp8_layer_fills_itself():
    layer = DenseFp8Linear(64, 16)
    layer.fill_random_()
    dense = layer.weight.float() * layer.weight_scale.t()
    assert dense.std() == pytest.approx(64**-0.5, rel=0.1)
    assert layer.weight.float().abs().amax(1).min() == 448


def test_attention_kernel_by_measurement():
    assert bench.fastest({"cudnn": {"p50": 2.0}, "flash": {"p50": 1.0}, "default": {"p50": 0.5}}) == "flash"
    assert bench.fastest({"cudnn": {"error": "no"}, "flash": {"p50": 1.0}}) == "flash"
    assert bench.fastest({"error": "the child died"}) == "default"
    with pytest.raises(ValueError, match="unknown attention"):
        bench.set_attention("fancy")


def _result(ms, peak):
    quantiles = {"p20": ms - 1.0, "p50": ms, "p80": ms + 1.0}
    return {
        "milliseconds": quantiles,
        "peak_bytes": peak,
        "build_seconds": 1.0,
        "first_step_seconds": 2.0,
        "finite": True,
        "same_bits_again": True,
    }


def test_results_are_written_after_each_contender(tmp_path, monkeypatch):
    results = {"bf16 eager": _result(174.0, 24e9), "bf16 compiled": _result(132.0, 24e9)}
    seen = []

    def isolated(module, tasks, *, silence, deadline, on_result):
        for task in tasks:
            if task["kind"] == "attention":
                on_result(task, {"cudnn": {"p50": 0.4}, "flash": {"p50": 0.5}})
                continue
            assert task["attention"] == "cudnn"
            result = results.get(task["name"], {"error": "out of memory"})
            if "optimized" in task["name"]:
                result = _result(66.0, 3e9)
            on_result(task, result)
            seen.append(list(json.loads((tmp_path / "transformer.json").read_text())["contenders"]))

    monkeypatch.setattr(bench, "run_isolated", isolated)
    monkeypatch.setattr(bench.results, "provenance", lambda device: {"device": "a GPU"})
    names = ["bf16 eager", "bf16 compiled", "W2A8 fp8 optimized, scratch", "W2A8 int8 stock"]
    lines = []
    run = bench.bench(tmp_path, contenders=names, checked=False, config=CONFIG, say=lines.append)
    assert seen == [names[:i] for i in range(1, 5)]
    found = run["contenders"]["W2A8 fp8 optimized, scratch"]
    assert found["speed"] == {"bf16 compiled": 2.0, "bf16 eager": pytest.approx(2.636, abs=1e-3)}
    assert found["memory"] == 8.0
    assert run["contenders"]["W2A8 int8 stock"]["error"] == "out of memory"
    assert json.loads((tmp_path / "transformer.json").read_text()) == run
    text = bench.table(run)
    assert "2.00x" in text
    assert "out of memory" in text
    assert len(lines) == 5
    with pytest.raises(ValueError, match="unknown contender 'x'"):
        bench.bench(tmp_path, contenders=["x"])


def test_a_bench_that_was_cut_short_goes_on(tmp_path, monkeypatch):
    asked: list[str] = []

    def isolated(module, tasks, *, silence, deadline, on_result):
        for task in tasks:
            asked.append(task.get("name", task["kind"]))
            late = {"error": "skipped: out of time"}
            on_result(task, {"cudnn": {"p50": 0.4}} if task["kind"] == "attention" else answers.get(task["name"], late))

    monkeypatch.setattr(bench, "run_isolated", isolated)
    versions = {"torch": "2.11"}
    monkeypatch.setattr(bench.results, "provenance", lambda _: {"device": "a GPU", "versions": versions, "time": "now"})
    names = ["bf16 eager", "bf16 compiled"]
    again = {"contenders": names, "checked": False, "config": CONFIG, "resume": True, "say": lambda _: None}
    answers = {"bf16 eager": _result(174.0, 24e9)}
    bench.bench(tmp_path, **again)
    assert asked == ["attention", *names]
    asked.clear()
    answers = {"bf16 compiled": _result(132.0, 24e9)}
    run = bench.bench(tmp_path, **again)
    assert asked == ["bf16 compiled"]
    assert [call["measured"] for call in run["calls"]] == [["bf16 eager"], ["bf16 compiled"]]
    assert run["contenders"]["bf16 compiled"]["speed"]["bf16 eager"] == pytest.approx(174 / 132, abs=1e-3)
    asked.clear()
    bench.bench(tmp_path, **again, size=2048)  # other settings: nothing is kept
    assert asked == ["attention", *names]
    asked.clear()
    versions = {"torch": "2.12"}
    bench.bench(tmp_path, **again)
    assert asked == ["attention", *names]


def test_the_check_compares_both_forwards_with_the_reference():
    torch.manual_seed(0)
    task = {"config": CONFIG, "backend": "auto", "size": 64}
    found = bench.check(task, "cpu")
    assert len(found) == 9
    assert all(error < (0.02 if label.startswith("w2a16") else 0.06) for label, error in found.items()), found


def test_tracing_that_fails_gives_nothing(monkeypatch):
    def broken(**kwargs):
        raise RuntimeError("no tracing here")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    assert bench.kernel_times(lambda: None) == {}
