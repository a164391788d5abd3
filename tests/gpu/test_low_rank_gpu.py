"""Low-rank updates on a GPU: every backend's product against the reference, captured, and with the same bits again."""

from __future__ import annotations

import pytest
import torch

from tritflow.formats.packing import pack_2bit
from tritflow.kernels import (
    BackendError,
    low_rank_add_,
    low_rank_down,
    quantize_activation,
    reference,
    w2a8_matmul,
    w2a16_low_rank,
)
from tritflow.testing import assert_close

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def _kinds():
    return ["int8", "float8_e4m3fn"] if torch.cuda.get_device_capability() >= (8, 9) else ["int8"]


def _product(tokens, rows, features, kind, groups=1, rank=16, gated=False):
    g = torch.Generator("cuda").manual_seed(0)
    on = {"generator": g, "device": "cuda"}
    trits = torch.randint(-1, 2, (rows, features), dtype=torch.int8, **on)
    q, scale = quantize_activation(torch.randn(tokens, features, **on), None, kind)
    row = (torch.rand(rows, **on) * features**-0.5).bfloat16()
    bias = torch.randn(rows, **on).bfloat16()
    low = torch.randn(tokens, groups * rank + 16, **on).bfloat16()
    up = (torch.randn(rows, rank, **on) * rank**-0.5).bfloat16()
    rest = (None, None)
    if gated:
        rest = (torch.randn(1, tokens, rows, **on).bfloat16(), torch.randn(1, rows, **on).bfloat16())
    # Several products' factors lie side by side.
    return [q, scale, pack_2bit(trits), row, torch.bfloat16, bias, *rest, low[:, 16:], up]


SHAPES = [
    ((1, 64, 128), 1, 16),
    ((128, 768, 256), 3, 16),
    ((300, 384, 1040), 1, 48),
    ((300, 960, 1040), 3, 32),  # tiles lie in two groups
    ((512, 9216, 3072), 3, 16),
    ((4608, 3072, 3072), 1, 64),
]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["triton", "hopper", "scratch", "auto"])
@pytest.mark.parametrize(("shape", "groups", "rank"), SHAPES)
def test_every_backend_adds_the_update(shape, groups, rank, backend, gated):
    for kind in _kinds():
        args = _product(*shape, kind, groups, rank, gated)
        try:
            found = w2a8_matmul(*args, backend=backend)
        except BackendError as error:
            if backend in ("triton", "auto"):
                raise
            pytest.skip(str(error))
        expected = reference.w2a8_matmul(*args)
        assert_close(found, expected, 8e-3)  # passes of their own round once more each
        assert_close(
            found - w2a8_matmul(*args[:-2], backend=backend), expected - reference.w2a8_matmul(*args[:-2]), 3e-2
        )


@pytest.mark.parametrize("backend", ["triton", "hopper", "scratch", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "groups", "rank"), SHAPES)
def test_16_bit_products_too(shape, groups, rank, dtype, backend):
    _, _, weight, row, _, bias, _, _, low, up = _product(*shape, "int8", groups, rank)
    x = torch.randn(shape[0], shape[2], device="cuda").to(dtype)
    args = (x, weight, row, bias.to(dtype), None, low.to(dtype), up.to(dtype))
    try:
        found = w2a16_low_rank(*args, backend)
    except BackendError as error:
        if backend in ("triton", "auto"):
            raise
        pytest.skip(str(error))
    assert_close(found, w2a16_low_rank(*args, "reference"), 8e-3)


@pytest.mark.parametrize("config", [{}, {"split": 1}, {"split": 1, "block_n": 128, "stages": 8, "lag": 2}, {"lag": 0}])
@pytest.mark.parametrize("rank", [16, 32, 128])
def test_every_hopper_tile(config, rank):
    from tritflow.kernels.hopper import why_not

    if why_not() is not None:
        pytest.skip(str(why_not()))
    from tritflow.kernels.hopper.launch import Config, w2a8_gemm

    for kind in _kinds():
        for shape, groups in (((4608, 9216, 3072), 3), ((600, 3072, 12288), 1), ((37, 264, 144), 1)):
            q, scale, weight, row, _, bias, _, _, low, up = _product(*shape, kind, groups, rank)
            out = torch.full((shape[0], shape[1]), float("nan"), dtype=torch.bfloat16, device="cuda")
            w2a8_gemm(q, scale, weight, row, bias, low, up, out=out, config=Config(**config))
            expected = reference.w2a8_matmul(q, scale, weight, row, torch.float32, bias, None, None, low, up)
            assert_close(out, expected, 4e-3)
            again = torch.full_like(out, float("nan"))
            for _ in range(20):
                w2a8_gemm(q, scale, weight, row, bias, low, up, out=again.fill_(float("nan")), config=Config(**config))
                assert torch.equal(again, out)
            # An update of zeros changes no bit.
            w2a8_gemm(q, scale, weight, row, bias, low * 0, up, out=again, config=Config(**config))
            assert torch.equal(again, w2a8_gemm(q, scale, weight, row, bias, config=Config(**config)))


@pytest.mark.parametrize("shape", [(1, 16, 128), (37, 48, 300), (512, 16, 12288), (4608, 48, 3072), (4608, 16, 15360)])
def test_down(shape):
    tokens, columns, features = shape
    for kind in _kinds():
        g = torch.Generator("cuda").manual_seed(0)
        q, scale = quantize_activation(torch.randn(tokens, features, device="cuda", generator=g), None, kind)
        down = torch.randn(columns, features, device="cuda", generator=g).bfloat16()
        found = low_rank_down(q, scale, down)
        assert_close(found, reference.low_rank_down(q, scale, down), 4e-3)
        for _ in range(20):
            assert torch.equal(low_rank_down(q, scale, down), found)


@pytest.mark.parametrize(("shape", "groups", "rank"), SHAPES)
def test_add(shape, groups, rank):
    *_, low, up = _product(*shape, "int8", groups, rank)
    y = torch.randn(shape[0], shape[1], device="cuda").bfloat16()
    expected = y.clone()
    reference.low_rank_add_(expected, low, up)
    low_rank_add_(y, low, up)
    assert_close(y, expected, 4e-3)


def test_a_graph_replays_both():
    args = _product(512, 3072, 3072, "int8")
    down = torch.randn(16, 3072, device="cuda").bfloat16() * 3072**-0.5

    def run():
        return w2a8_matmul(*args[:-2], low_rank_down(args[0], args[1], down), args[-1])

    expected = run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(3):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
