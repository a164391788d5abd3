"""The bench of a loaded LoRA as far as a CPU can run it."""

from __future__ import annotations

import pytest
import torch
from tiny_config import CONFIG

from tritflow.profiling import lora
from tritflow.profiling.transformer import CONTENDERS, Schedule, build, step_inputs

pytest.importorskip("peft")


def test_times_without_an_adapter_surround_those_with_it(monkeypatch):
    settings = CONTENDERS["W2A8 int8 optimized, LoRA r16"]
    model = build(settings, CONFIG, "cpu")
    inputs = step_inputs(CONFIG, 64, 1, "cpu", torch.bfloat16)
    t = Schedule(4, "cpu").timesteps[1].expand(1).bfloat16() / 1000
    milliseconds = iter([10.0, 12.0])
    seen = []

    @torch.no_grad()
    def step():
        return model(**inputs, timestep=t)[0]

    def timed(run, count, warm):
        seen.append(run())
        return [next(milliseconds)] * count

    monkeypatch.setattr(lora, "timed", timed)
    beside = lora.Beside(model, step, 16, 3)
    adapted = step()
    result = beside.finish({"p50": 12.1})
    plain, again = seen
    assert torch.equal(plain, again)
    assert torch.isfinite(adapted).all()
    assert not torch.equal(plain, adapted)
    assert result["layers"] == 12 + 5  # all block linears but modulation
    assert result["slowdown"] == pytest.approx(0.1)
    assert "LoRA of rank 16 on 17 layers: +10.0 % (11.00 ms without)" in lora.line(result)
