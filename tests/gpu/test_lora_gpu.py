"""LoRA over ternary layers on a GPU: peft's numbers, captured and compiled, and what it costs a layer of FLUX.1-dev."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import peft

from tritflow import TernaryLinear
from tritflow.pipelines.lora_layer import adopt_
from tritflow.testing import assert_close, random_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def make(columns: int, rows: int, mode: str) -> tuple[nn.Module, nn.Module]:
    """(adopted, peft's own) in bf16 on the GPU, of rank 16."""
    g = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (rows, columns), generator=g, dtype=torch.int8)
    scale = torch.full((rows,), columns**-0.5)
    model = nn.Sequential()
    model.add_module("proj", TernaryLinear.from_linear(random_linear(columns, rows), trits, scale, mode=mode))
    peft.inject_adapter_in_model(peft.LoraConfig(r=16, target_modules=["proj"]), model)
    nn.init.normal_(model.proj.lora_B["default"].weight, std=0.1, generator=g)
    model.bfloat16().cuda()
    stock = copy.deepcopy(model)
    assert adopt_(model) == 1
    return model, stock


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_equals_peft_captures_and_compiles(mode: str) -> None:
    model, stock = make(3072, 3072, mode)
    x = torch.randn(2, 300, 3072, device="cuda").bfloat16()
    with torch.no_grad():
        eager = model(x)
        assert_close(eager, stock(x), 6e-3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = model(x)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
        assert_close(torch.compile(model, fullgraph=True)(x), eager, 6e-3)


def test_it_is_no_slower_than_peft() -> None:
    model, stock = make(3072, 12288, "w2a8")
    x = torch.randn(1, 4608, 3072, device="cuda").bfloat16()

    def milliseconds(layer: nn.Module) -> float:
        times = []
        with torch.no_grad():
            for _ in range(30):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                layer(x)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end))
        return sorted(times)[len(times) // 2]

    bare, ours, pefts = (milliseconds(m) for m in (model.proj.base_layer, model, stock))
    print(f"4608x12288x3072 w2a8, median ms: bare {bare:.3f}, with LoRA r16 {ours:.3f}, peft's own {pefts:.3f}")
    assert ours <= pefts
