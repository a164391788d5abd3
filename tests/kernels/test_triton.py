"""The plain Triton kernels through Triton's interpreter, which needs no GPU.

The interpreter multiplies bf16 as integers and truncates where a GPU rounds to 8 or 16 bits, so products are tried in
fp32 and fp16 and on 8-bit values that the reference quantized; tests/gpu covers the rest.
"""

from __future__ import annotations

import pytest
from interpreter import inside

pytest.importorskip("triton")


SHAPES = [(1, 1, 1), (5, 24, 70), (3, 7, 128), (17, 65, 257), (70, 130, 384)]


def _poison(monkeypatch):
    """Outputs start as NaN or nonsense, so that an element nobody wrote is seen."""
    import torch

    from tritflow.kernels.triton import gemm, quantize

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.itemsize > 1 else out.fill_(77)

    real = torch.empty
    for module in (gemm, quantize):
        monkeypatch.setattr(module.torch, "empty", empty)


@inside
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_product_is_exact(problem, monkeypatch, shape):
    import torch

    from tritflow.kernels.triton.gemm import w2a8_gemm

    p = problem(*shape)
    q = torch.randint(-127, 128, (shape[0], shape[2]), dtype=torch.int8)
    one_m, one_n = torch.ones(shape[0]), torch.ones(shape[1])
    _poison(monkeypatch)
    out = w2a8_gemm(q, one_m, p["weight"], one_n, None, torch.float32)
    assert torch.equal(out.long(), q.long() @ p["trits"].long().t())


@inside
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_w2a8_epilogue(problem, monkeypatch, dtype, bias):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.gemm import w2a8_gemm
    from tritflow.testing import assert_close

    p = problem(9, 40, 200)
    b = p["bias"] if bias else None
    q, scale = reference.quantize_activation(p["x"], p["input_scale"], dtype)
    expected = reference.w2a8_linear(p["x"], p["weight"], p["weight_scale"], b, p["input_scale"], dtype)
    _poison(monkeypatch)
    assert_close(w2a8_gemm(q, scale, p["weight"], p["weight_scale"], b, torch.float32), expected, 1e-6)


@inside
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_w2a16(problem, monkeypatch, shape, dtype, columns):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.backend import w2a16_linear
    from tritflow.testing import assert_close

    p = problem(*shape, dtype=getattr(torch, dtype))
    args = (p["weight"], p["weight_scale"], p["bias"], p["input_scale"] if columns else None)
    expected = reference.w2a16_linear(p["x"], *args)
    _poison(monkeypatch)
    tolerance = 1e-5 if dtype == "float32" else 2e-3
    assert_close(w2a16_linear(p["x"], *args), expected, tolerance)
    wide = torch.cat([p["x"], p["x"]], dim=1)[:, : shape[2]]
    assert_close(w2a16_linear(wide, *args), expected, tolerance)


@inside
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (6, 70), (3, 1300)])
def test_quantize_equals_the_reference_bit_for_bit(problem, monkeypatch, shape, columns):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.quantize import quantize_activation

    p = problem(shape[0], 1, shape[1])
    p["x"][0] = 0
    c = p["input_scale"] if columns else None
    _poison(monkeypatch)
    for found, expected in zip(quantize_activation(p["x"], c), reference.quantize_activation(p["x"], c), strict=True):
        assert torch.equal(found, expected)


@inside
def test_quantize_passes_nan_on(problem):
    import torch

    from tritflow.kernels.triton.quantize import quantize_activation

    x = problem(3, 1, 40)["x"]
    x[1, 7] = float("nan")
    scale = quantize_activation(x)[1]
    assert torch.isfinite(scale).tolist() == [True, False, True]


@inside
def test_a_linear_from_end_to_end_and_without_tokens(problem):
    from tritflow.kernels import reference
    from tritflow.kernels.triton import backend
    from tritflow.testing import assert_close

    p = problem(12, 24, 70)
    args = (p["weight"], p["weight_scale"], p["bias"], p["input_scale"])
    x = p["x"].view(3, 4, 70)
    assert_close(backend.w2a8_linear(x, *args), reference.w2a8_linear(x, *args), 1e-6)
    assert backend.w2a8_linear(x[:0], *args).shape == (0, 4, 24)
    assert backend.w2a16_linear(x[:, :0], *args).shape == (3, 0, 24)
