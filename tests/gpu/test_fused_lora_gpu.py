"""LoRA in the fused forward on a GPU, at FLUX.1-dev's width: graphs, weights that change, unloading."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from tritflow.formats.architecture import FLUX1_DEV
from tritflow.pipelines import synthetic
from tritflow.pipelines.optimize import optimize
from tritflow.profiling.contenders import Schedule, step_inputs
from tritflow.profiling.lora import load_
from tritflow.testing import assert_close, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

TOLERANCE = {"w2a8": 3e-2, "w2a16": 1.5e-2}
"""Of four blocks of random weights in bf16; without adapters the two forwards are 1.3e-2 and .7e-2 apart."""


@pytest.mark.parametrize(("mode", "kind"), [("w2a8", "int8"), ("w2a8", "float8_e4m3fn"), ("w2a16", "int8")])
def test_equals_the_stock_forward_and_leaves_no_trace(mode, kind, caplog):
    config = {**FLUX1_DEV, "num_layers": 2, "num_single_layers": 2}
    model = synthetic.random_ternary(config, "cuda", mode=mode, activation_dtype=kind)
    inputs = step_inputs(config, 512, 1, "cuda", torch.bfloat16)
    inputs["timestep"] = torch.full((1,), 0.5, device="cuda", dtype=torch.bfloat16)

    optimize(model, scheduler=Schedule(4, "cuda"))

    @torch.no_grad()
    def fused():
        return [model(**inputs)[0] for _ in range(3)]  # as it is, recorded, replayed

    plain = fused()[-1]
    load_(model, 16)
    adapted = fused()
    expected = stock_of(model, inputs)
    for out in adapted:
        assert_close(out, expected, TOLERANCE[mode])
    assert relative_error(plain, expected) > 2 * TOLERANCE[mode]
    model.set_adapters(["bench"], weights=[2.0])
    after = fused()
    assert all(torch.equal(out, after[0]) for out in after)
    assert relative_error(adapted[0], after[0]) > TOLERANCE[mode]
    model.unload_lora()
    assert all(torch.equal(out, plain) for out in fused())
    assert "stock forward" not in caplog.text


@torch.no_grad()
def stock_of(model, inputs):
    fused = model.__dict__["_tritflow_fused"]
    fused.modulation.restore_(fused.device)
    fused._signature = []  # the modulation layers leave again with the next fused call
    return fused.stock_forward(**inputs)[0]
