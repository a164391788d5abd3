"""The plain Triton kernels as a GPU runs them, against the reference on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tritflow.formats.packing import pack_2bit
from tritflow.kernels import quantize_activation, reference, w2a8_linear, w2a16_linear
from tritflow.modules import TernaryLinear
from tritflow.testing import assert_close, random_linear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(1, 1, 1), (5, 24, 70), (70, 130, 384), (200, 257, 131), (512, 384, 3072), (1, 1536, 256), (0, 8, 64)]
DTYPES = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}


def _problem(tokens, out_features, in_features, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (out_features, in_features), generator=g, dtype=torch.int8)
    return (
        torch.randn(tokens, in_features, generator=g).to(dtype),
        pack_2bit(trits),
        (torch.rand(out_features, generator=g) * 0.1 + 0.01).bfloat16(),
        torch.randn(out_features, generator=g).to(dtype),
        (torch.rand(in_features, generator=g) + 0.5).bfloat16(),
    )


def _gpu(args):
    return tuple(t.cuda() for t in args)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linears(shape, dtype):
    args = _problem(*shape, dtype=dtype)
    on = _gpu(args)
    for found, expected in (
        (w2a16_linear(*on, backend="triton"), reference.w2a16_linear(*args)),
        (w2a8_linear(*on, backend="triton"), reference.w2a8_linear(*args)),
    ):
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        if shape[0]:
            assert_close(found, expected, DTYPES[dtype])


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_quantize_equals_the_reference_bit_for_bit(dtype, kind):
    if kind != "int8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 on this GPU")
    for shape in ((33, 1, 70), (300, 1, 3072), (4, 1, 15360)):
        x, *_, columns = _problem(*shape, dtype=dtype)
        x[0] = 0
        for c in (None, columns):
            expected = reference.quantize_activation(x, c, kind)
            found = quantize_activation(x.cuda(), None if c is None else c.cuda(), kind)
            assert torch.equal(found[0].cpu().view(torch.int8), expected[0].view(torch.int8))
            assert torch.equal(found[1].cpu(), expected[1])


def test_int8_product_is_exact_and_repeatable():
    from tritflow.kernels.triton.gemm import w2a8_gemm

    g = torch.Generator().manual_seed(5)
    for shape in ((300, 200, 15360), (64, 96, 1000), (7, 33, 129)):
        _, weight, *_ = _problem(*shape)
        q = torch.randint(-127, 128, (shape[0], shape[2]), generator=g, dtype=torch.int8)
        expected = reference.integer_product(q, weight)
        m, n = torch.ones(shape[0]).cuda(), torch.ones(shape[1]).cuda()
        for _ in range(20):
            out = w2a8_gemm(q.cuda(), m, weight.cuda(), n, None, torch.float32)
            assert torch.equal(out.cpu(), expected)


def test_fp8_product():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 on this GPU")
    args = _problem(200, 256, 3072, torch.bfloat16)
    found = w2a8_linear(*_gpu(args), activation_dtype="float8_e4m3fn", backend="triton")
    assert_close(found, reference.w2a8_linear(*args, "float8_e4m3fn"), 4e-3)


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_module_moves_captures_and_compiles(mode):
    linear = random_linear(256, 384)
    g = torch.Generator().manual_seed(1)
    trits = torch.randint(-1, 2, (384, 256), generator=g, dtype=torch.int8)
    layer = TernaryLinear.from_linear(
        linear, trits, torch.rand(384, generator=g), mode=mode, backend="triton"
    ).bfloat16()
    x = torch.randn(2, 40, 256, generator=g).bfloat16()
    layer.backend = "reference"
    expected = layer(x)
    layer.backend = "triton"
    layer.cuda()
    assert layer.weight.is_cuda
    assert layer.weight.shape == (384, 256)
    x = x.cuda()
    assert_close(layer(x), expected, 4e-3)
    with torch.no_grad():
        for _ in range(2):
            eager = layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x)
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, eager)
        assert torch.equal(torch.compile(layer, fullgraph=True)(x), eager)
    layer.backend = "auto"
    assert_close(layer.cpu()(x.cpu()), expected, 4e-3)


@pytest.mark.parametrize("shape", [(4608, 384, 3072), (100, 256, 1040), (1, 1536, 256), (8, 3072, 3072), (30, 64, 256)])
def test_auto_agrees_with_the_reference_whichever_kernel_it_takes(shape):
    args = _problem(*shape, dtype=torch.bfloat16)
    on = _gpu(args)
    assert_close(w2a8_linear(*on), reference.w2a8_linear(*args), 4e-3)
    assert_close(w2a16_linear(*on), reference.w2a16_linear(*args), 4e-3)
    assert_close(w2a16_linear(*on[:4]), reference.w2a16_linear(*args[:4]), 4e-3)


@pytest.mark.parametrize("backend", ["triton", "hopper"])
def test_opcheck_on_the_gpu(backend):
    from tritflow.kernels import describe

    if not describe()[backend].startswith("ready"):
        pytest.skip(describe()[backend])
    x, weight, scale, bias, columns = _gpu(_problem(64, 128, 256, torch.bfloat16))
    torch.library.opcheck(torch.ops.tritflow.w2a8_linear.default, (x, weight, scale, bias, columns, "int8", backend))
    if backend == "triton":
        torch.library.opcheck(torch.ops.tritflow.w2a16_linear.default, (x, weight, scale, bias, columns, backend))
    else:
        torch.library.opcheck(torch.ops.tritflow.w2a16_linear.default, (x[:8], weight, scale, bias, None, backend))
