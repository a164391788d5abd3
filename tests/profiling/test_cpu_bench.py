from __future__ import annotations

from tritflow import results
from tritflow.kernels import cpu_activations
from tritflow.profiling import cpu


def test_a_small_flux_step_has_its_104_linears():
    shapes = cpu.small_step(2)
    assert len(shapes) == 104
    assert shapes[0] == cpu.Product(2, 1536, 256)
    assert shapes.count(cpu.Product(224, 256, 1280)) == 8
    assert shapes.count(cpu.Product(128, 1024, 256)) == shapes.count(cpu.Product(96, 1024, 256)) == 4
    assert sum(shape.same_input for shape in shapes) == 4 * 2 * 2 + 8 * 3


def test_every_input_is_quantized_unless_a_model_would_share_it(monkeypatch):
    quantized = []
    real = cpu_activations.quantize
    monkeypatch.setattr(cpu_activations, "quantize", lambda *a: quantized.append(1) or real(*a))
    shapes = [cpu.Product(4, 16, 32), cpu.Product(4, 16, 32, True), cpu.Product(4, 16, 32), cpu.Product(4, 8, 16)]
    candidates, _ = cpu._candidates(shapes)
    for _ in range(3):
        quantized.clear()
        candidates["w2a8 bf16"]()
        assert len(quantized) == 3


def test_the_benchmark_reports_ratios_of_its_own_medians_and_is_stored(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "LARGE", cpu.Product(8, 48, 64))
    monkeypatch.setattr(cpu, "small_step", lambda batch: [cpu.Product(batch, 16, 32), cpu.Product(batch, 32, 16)])
    run = cpu.bench_cpu(0.05, note="a test")
    assert run["note"] == "a test"
    assert len(run["comparisons"]) == 3
    for part in run["comparisons"].values():
        times = part["milliseconds"]
        assert len(times) == 6
        assert all(0 < t["p20"] <= t["p50"] <= t["p80"] for t in times.values())
        rival = min(times["dense fp32"]["p50"], times["dense bf16"]["p50"])
        best = min(times["w2a8 fp32"]["p50"], times["w2a8 bf16"]["p50"])
        assert abs(part["speedup"]["w2a8"] - rival / best) < 1e-3
    resident = run["comparisons"]["64 -> 48, 8 tokens"]["resident_bytes"]
    packed, weights = 48 * 32, 48 * 64
    assert resident == {
        "dense fp32": weights * 4,
        "dense bf16": weights * 2,
        "w2a16 fp32": packed + weights * 4,
        "w2a16 bf16": packed + weights * 2,
        "w2a8 fp32": packed + weights,
        "w2a8 bf16": packed + weights,
    }
    path = tmp_path / "kernels-cpu.json"
    stored = results.append(path, "kernels-cpu", run)
    assert results.read(path, "kernels-cpu")[0]["id"] == stored["id"]
    assert "w2a8 bf16" in cpu.table(run)
