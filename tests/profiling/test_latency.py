"""Whole generations on a tiny FLUX: what is counted, and how it is compared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tritflow import results
from tritflow.modules import TernaryLinear
from tritflow.pipelines.loading import ModelError
from tritflow.profiling import latency
from tritflow.testing import random_linear


def test_resident_bytes_count_packed_weights_scales_and_what_the_kernels_keep() -> None:
    n, k = 48, 64
    linear = random_linear(k, n)
    layer = TernaryLinear.from_linear(linear, torch.ones(n, k, dtype=torch.int8), torch.ones(n), mode="w2a8")
    model = nn.Sequential(layer, nn.LayerNorm(n))
    packed, scales, bias, norm = n * 32, 2 * n, 4 * n, 2 * 4 * n
    assert latency.resident_bytes(model) == packed + scales + bias + norm
    model(torch.randn(2, k))
    assert latency.resident_bytes(model) == packed + scales + bias + norm + n * k
    assert latency.resident_bytes(linear) == 4 * n * k + bias


def test_speed_is_against_the_faster_dense_type() -> None:
    times = {"dense fp32": [10.0, 12.0, 11.0], "dense bf16": [9.0, 30.0, 8.0], "W2A8 bf16": [6.0, 20.0, 4.5]}
    found = latency.compare(times)
    assert {row["against"] for row in found.values()} == {"dense bf16"}
    assert found["dense bf16"]["speed"] == 1
    assert found["dense fp32"]["speed"] == pytest.approx(9 / 11)
    assert found["W2A8 bf16"]["speed"] == pytest.approx(9 / 6)
    assert found["W2A8 bf16"]["speed_paired"]["p50"] == pytest.approx(1.5)
    assert found["dense fp32"]["milliseconds"]["p50"] == 11
    assert found["dense fp32"]["spread"] == pytest.approx((11.6 - 10.4) / 11)


@pytest.fixture(scope="module")
def tiny_ternary(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tritflow.pipelines.quantize import quantize
    from tritflow.recipes import load_recipe

    out = tmp_path_factory.mktemp("ternary") / "out"
    quantize(str(tiny_flux), out, load_recipe("absmean"))
    return out


def test_every_candidate_draws_in_every_round_and_is_stored(
    tiny_flux: Path, tiny_ternary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[int, torch.dtype]] = []
    generate = latency.generate

    def spy(pipe, prompts, seeds, **settings):  # type: ignore[no-untyped-def]
        drawn.append((len(prompts), pipe.transformer.dtype))
        return generate(pipe, prompts, seeds, **settings)

    monkeypatch.setattr(latency, "generate", spy)
    seen: list[tuple[int, int]] = []
    rows = latency.measure(
        tiny_flux, tiny_ternary, batch_sizes=[1, 2], rounds=2, progress=lambda *a: seen.append(a), note="a test"
    )
    assert [r["label"] for r in rows] == [f"{v.name}, batch {b}" for b in (1, 2) for v in latency.VARIANTS]
    assert len(drawn) == 2 * 3 * len(latency.VARIANTS)
    assert seen[-1] == (len(drawn), len(drawn))
    assert [size for size, _ in drawn].count(2) == len(drawn) // 2
    by_name = {r["variant"]: r for r in rows if r["batch"] == 1}
    for row in rows:
        ms = row["milliseconds"]
        assert 0 < ms["p20"] <= ms["p50"] <= ms["p80"]
        assert row["cpu_milliseconds"]["p50"] > 0
        assert (row["rounds"], row["note"]) == (2, "a test")
        stored = results.append(tmp_path / "latency.json", "latency-cpu", row)
        assert stored["label"] == row["label"]
    # A dense weight is four or two bytes; int8 trits are one, beside the packed bytes.
    resident = {name: row["resident_bytes"] for name, row in by_name.items()}
    assert resident["dense fp32"] == 2 * resident["dense bf16"]
    assert resident["W2A8 fp32"] < resident["W2A16 fp32"]
    assert resident["W2A8 bf16"] < resident["W2A16 bf16"]
    # The fused forward keeps the same expanded weights, joined; its modulation rows are no weights.
    for name in ("W2A16 fp32", "W2A16 bf16", "W2A8 fp32", "W2A8 bf16"):
        assert resident[f"{name} optimized"] == resident[name]
    assert "W2A8 bf16, batch 2" in latency.table(rows)


def test_a_dense_twin_and_no_rounds_are_refused(tiny_flux: Path) -> None:
    with pytest.raises(ModelError, match="dense"):
        latency.measure(tiny_flux, tiny_flux, rounds=1)
    with pytest.raises(ValueError, match="round"):
        latency.measure(tiny_flux, tiny_flux, rounds=0)
