from __future__ import annotations

import pytest
import torch

from tritflow.kernels import quantize_activation, reference, w2a8_linear, w2a16_linear
from tritflow.testing import assert_close

OPS = torch.ops.tritflow
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def _args(p, *, bias=True, columns=True):
    return (
        p["x"],
        p["weight"],
        p["weight_scale"],
        p["bias"] if bias else None,
        p["input_scale"] if columns else None,
    )


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_opcheck(problem, full, grad):
    p = problem(5, 24, 70)
    args = _args(p, bias=full, columns=full)
    args[0].requires_grad_(grad)
    torch.library.opcheck(OPS.w2a16_linear.default, args)
    torch.library.opcheck(OPS.w2a8_linear.default, args)
    x = p["x"].detach()
    for dtype in reference.QMAX:
        torch.library.opcheck(OPS.quantize_activation.default, (x, args[4], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (7, 8, 128), (64, 33, 129), (300, 40, 257), (0, 8, 64)])
def test_backends_agree_with_the_reference(problem, shape, dtype):
    p = problem(*shape, dtype=dtype)
    for columns in (False, True):
        args = _args(p, columns=columns)
        for op in (w2a16_linear, w2a8_linear):
            expected = getattr(reference, op.__name__)(*args)
            for backend in ("auto", "reference"):
                out = op(*args, backend=backend)
                assert out.dtype == dtype
                if shape[0]:
                    assert_close(out, expected, TOLERANCE[dtype])
                else:
                    assert out.shape == (0, shape[1])


def test_leading_dimensions_and_strides(problem):
    p = problem(24, 16, 96)
    w = (p["weight"], p["weight_scale"], p["bias"])
    for op in (w2a16_linear, w2a8_linear):
        flat = op(p["x"], *w)
        assert torch.equal(op(p["x"].view(2, 3, 4, 96), *w), flat.view(2, 3, 4, 16))
        wide = torch.randn(24, 200)
        wide[:, 7:103] = p["x"]
        assert_close(op(wide[:, 7:103], *w), flat, 1e-6)
        assert_close(op(p["x"].t().contiguous().t(), *w), flat, 1e-6)
        assert_close(op(p["x"][0], *w), flat[0], 1e-6)
        assert op(p["x"].view(2, 12, 96)[:, :0], *w).shape == (2, 0, 16)


def test_gradients_are_those_of_the_dense_layer(problem):
    p = problem(6, 20, 50)
    x, weight, scale, bias, columns = _args(p)
    dense = reference.dequantize(weight, 50, scale, columns)
    x.requires_grad_()
    bias.requires_grad_()
    seed = torch.randn(6, 20)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), seed)
    for op in (w2a16_linear, w2a8_linear):
        found = torch.autograd.grad(op(x, weight, scale, bias, columns), (x, bias), seed)
        assert_close(found[0], expected[0], 1e-5)
        assert_close(found[1], expected[1], 1e-6)


@pytest.mark.parametrize("op", [w2a16_linear, w2a8_linear])
def test_compiles_without_a_graph_break_for_any_number_of_tokens(problem, op):
    p = problem(12, 16, 72)
    w = (p["weight"], p["weight_scale"], p["bias"], p["input_scale"])

    def f(x):
        return torch.nn.functional.gelu(op(x * 2, *w)) + 1

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (12, 5):
        assert_close(compiled(p["x"][:tokens]), f(p["x"][:tokens]), 1e-6)
    quantize = torch.compile(lambda x: quantize_activation(x)[1] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(quantize(p["x"]), quantize_activation(p["x"])[1] + 1)


def test_meta_tensors_have_shapes(problem):
    p = {name: t.to("meta") for name, t in problem(5, 24, 70).items()}
    assert w2a8_linear(*_args(p)).shape == (5, 24)
    q, scale = quantize_activation(p["x"], dtype="float8_e4m3fn")
    assert (q.shape, q.dtype, scale.shape) == ((5, 70), torch.float8_e4m3fn, (5,))


def test_wrong_arguments_are_named(problem):
    p = problem(5, 24, 200)
    x, weight, scale, bias, columns = _args(p)
    with pytest.raises(ValueError, match=r"uint8 \[N, 32\]"):
        w2a16_linear(x[:, :100], weight, scale)
    with pytest.raises(ValueError, match="packed two bits a trit"):
        w2a16_linear(x, weight.to(torch.int8), scale)
    with pytest.raises(ValueError, match=r"weight_scale must have shape \[24\]"):
        w2a8_linear(x, weight, scale[:3])
    with pytest.raises(ValueError, match="bias must"):
        w2a8_linear(x, weight, scale, bias[:1])
    with pytest.raises(ValueError, match="input_scale must"):
        w2a8_linear(x, weight, scale, bias, columns[:9])
    with pytest.raises(ValueError, match="float tensor"):
        w2a16_linear(x.int(), weight, scale)
    with pytest.raises(ValueError, match="int4"):
        w2a8_linear(x, weight, scale, activation_dtype="int4")
    with pytest.raises(ValueError, match="int4"):
        quantize_activation(x, dtype="int4")
