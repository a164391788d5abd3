"""The attention benchmark's own arithmetic, on the CPU; a GPU runs it through `tritflow bench attention`."""

import pytest
import torch

from tritflow.kernels import attention as attention_8bit
from tritflow.kernels import normed_attention
from tritflow.models.flux1_blocks import attend
from tritflow.profiling import attention as bench

SHAPE = (160, 2, 32)


@pytest.fixture
def on_cpu(monkeypatch):
    """Inputs on the CPU and times that are not measured: as many microseconds as the candidate's place."""
    make = bench.inputs
    monkeypatch.setattr(bench, "inputs", lambda shape, kind, seed=0: make(shape, kind, seed, "cpu"))

    def times(candidates, rounds):
        for candidate in candidates:
            assert candidate.name == "product" or candidate.run(0).shape == (1, *SHAPE)
        # A product takes half a microsecond.
        extra = 0.5 if candidates[-1].name == "product" else 0.0
        found = {c.name: {"p20": 1.0, "p50": i + 1 + extra, "p80": 99.0} for i, c in enumerate(candidates)}
        return found | ({"product": {"p50": extra}} if extra else {})

    monkeypatch.setattr(bench, "graph_times", times)
    raw = bench.projected
    monkeypatch.setattr(bench, "projected", lambda shape, seed=0: raw(shape, seed, "cpu"))


def _eight_bit(name="eight"):
    def whole(q, k, v, *rest):
        return normed_attention(q, k, v, *rest)

    return bench.Contender(name, lambda q, k, v: None, lambda given, prepared: attention_8bit(*given), whole)


def test_measure_states_times_ratios_and_errors(on_cpu):
    base = bench.Contender(
        "cudnn bf16", lambda q, k, v: None, lambda given, prepared: attend(*given), lambda *given: attend(*given)
    )
    lines = []
    result = bench.measure(SHAPE, [base, _eight_bit()], say=lines.append)
    assert result["shape"] == [1, 160, 2, 32]
    assert list(result["microseconds"]) == ["cudnn bf16", "eight", "eight, in all"]
    assert result["speedup"] == {"cudnn bf16": 1.0, "eight": 0.5, "eight, in all": 0.333}
    assert result["tflops"]["cudnn bf16"] == round(4e-6 * 160 * 160 * 2 * 32, 1)
    row = result["contenders"]["eight"]
    assert (row["alone"], row["in_all"], row["in_all_speedup"]) == (2.0, 3.0, pytest.approx(1 / 3))
    assert (row["among_products"], row["among_products_speedup"]) == (2.0, 0.5)
    assert (row["from_products"], row["from_products_speedup"]) == (2.0, 0.5)
    for kind in bench.KINDS:
        assert result["errors"][kind]["cudnn bf16"] < 0.01
        assert 0.01 < result["errors"][kind]["eight"] < 0.08
    assert len(lines) == 3


def test_what_fails_is_said_and_left_out(on_cpu):
    def fail(*args):
        raise RuntimeError("not on this GPU\nat all")

    lines = []
    result = bench.measure(SHAPE, [bench.Contender("broken", fail, fail, fail), _eight_bit()], say=lines.append)
    assert lines[0] == "broken: not on this GPU"
    assert "broken" not in result["microseconds"]
    assert result["speedup"] == {}


def test_exact_is_attention():
    q, k, v = bench.inputs(SHAPE, "normal", device="cpu")
    assert bench.relative_error(attend(q.float(), k.float(), v.float()), bench.exact(q, k, v)) < 1e-5


def test_kinds_of_inputs():
    normal = bench.inputs(SHAPE, "normal", device="cpu")
    for kind, part in (("peaked", 0), ("biased keys", 1), ("outlier values", 2)):
        some = bench.inputs(SHAPE, kind, device="cpu")
        assert [torch.equal(a, b) for a, b in zip(some, normal, strict=True)] == [i != part for i in range(3)]
    with pytest.raises(ValueError, match="unknown kind of inputs 'odd'"):
        bench.inputs(SHAPE, "odd", device="cpu")


def test_a_worker_reports_a_wrong_kernel(on_cpu, monkeypatch):
    task = {"shape": list(SHAPE), "dtype": "int8", "settings": {}}
    monkeypatch.setattr(bench, "hopper", lambda dtype, settings: _eight_bit())
    assert bench.handle(task)["relative_error"] < 0.05
    zeros = _eight_bit("zeros")
    monkeypatch.setattr(bench, "hopper", lambda dtype, settings: zeros)
    zeros.whole = lambda q, *rest: torch.zeros_like(q)
    assert "wrong from a product's outputs: relative error 1" in bench.handle(task)["error"]
    zeros.run = lambda given, prepared: torch.zeros_like(given[0])
    assert "wrong: relative error 1" in bench.handle(task)["error"]
