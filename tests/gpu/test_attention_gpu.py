"""8-bit attention as a GPU runs it, against the reference on the CPU and against float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from tritflow.kernels import BackendError, attention
from tritflow.kernels.attention_reference import attention as reference

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SHAPES = [(1, 4608, 2, 128), (2, 300, 3, 64), (1, 1, 2, 128), (1, 129, 2, 128), (0, 5, 2, 64)]
BACKENDS = ("triton", "hopper")


def _inputs(shape, dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    return tuple(t.to(dtype) for t in (q, k + 3 * torch.randn(shape[-1], generator=g), v * 5))


def _run(args, kind, backend):
    if kind != "int8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no e4m3 on this GPU")
    try:
        return attention(*args, kind, backend=backend)
    except BackendError as error:
        if backend == "triton":  # takes every one of these shapes on every GPU
            raise
        pytest.skip(str(error))


def _error(found, expected):
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-9))


@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_the_reference(shape, backend, kind):
    args = _inputs(shape)
    found = _run([t.cuda() for t in args], kind, backend).cpu()
    assert (found.shape, found.dtype) == (shape, torch.bfloat16)
    if shape[0]:
        assert not found.isnan().any()
        # The two round the same numbers, but logits that differ in their last bits round to other weights now and then.
        bound = 0.045 if backend == "hopper" else 0.015
        assert _error(found, reference(*args, kind)) < bound


@pytest.mark.parametrize("backend", BACKENDS)
def test_error_against_float32(backend):
    args = [t.cuda() for t in _inputs((1, 2048, 4, 128))]
    exact = F.scaled_dot_product_attention(*(t.float().transpose(1, 2) for t in args)).transpose(1, 2)
    assert _error(_run(args, "int8", backend), exact) < 0.05
    assert _error(_run(args, "float8_e4m3fn", backend), exact) < 0.065


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_strided_inputs_and_other_dtypes(backend, dtype):
    joint = torch.randn(2, 260, 3, 2, 128, generator=torch.Generator().manual_seed(1)).to(dtype).cuda()
    q, k, v = joint.unbind(2)
    found = _run((q, k, v), "int8", backend)
    assert found.dtype == dtype
    assert torch.equal(found, _run([t.contiguous() for t in (q, k, v)], "int8", backend))
    assert _error(found.cpu(), reference(*(t.cpu() for t in (q, k, v)))) < 0.045


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeats_bit_for_bit_and_in_a_graph(backend):
    args = [t.cuda() for t in _inputs((1, 1111, 24, 128))]
    first = _run(args, "int8", backend)
    for _ in range(200):
        assert torch.equal(first, _run(args, "int8", backend))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _run(args, "int8", backend)
    graph.replay()
    assert torch.equal(first, captured)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_is_seen(backend, which):
    args = [t.cuda() for t in _inputs((1, 300, 2, 64))]
    args[which][0, 200, 0, 3] = float("nan")
    found = _run(args, "int8", backend)
    assert found[0, 200, 0].isnan().any()
    assert not found[0, :, 1].isnan().any()


def test_compiles_without_a_graph_break():
    args = [t.cuda() for t in _inputs((1, 256, 2, 64))]
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, fullgraph=True)
    assert torch.equal(compiled(*args), attention(*args) * 2)
