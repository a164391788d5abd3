"""Low-rank updates beside ternary products: what they compute, and the Triton kernels through the interpreter."""

from __future__ import annotations

import pytest
import torch
from interpreter import inside, outside

from tritflow.kernels import (
    low_rank_add_,
    low_rank_down,
    quantize_activation,
    reference,
    w2a8_matmul,
    w2a16_linear,
    w2a16_low_rank,
)
from tritflow.testing import assert_close

KINDS = list(reference.QMAX)
GROUPS = [1, 3]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _dense_update(low, up, groups):
    """`low @ up^T` with every group's columns at the place that a block-diagonal factor would give them."""
    rows, rank = up.shape[0] // groups, up.shape[1]
    parts = [low[:, g * rank : (g + 1) * rank] @ up[g * rows : (g + 1) * rows].t() for g in range(groups)]
    return torch.cat(parts, dim=1)


@outside
@pytest.mark.parametrize("kind", KINDS)
def test_down_is_the_factor_on_dequantized_rows(kind):
    q, scale = quantize_activation(_randn(7, 200), None, kind)
    down = _randn(24, 200, seed=1)
    assert_close(low_rank_down(q, scale, down), (q.float() * scale[:, None]) @ down.t(), 1e-6)
    half = low_rank_down(q, scale, down.bfloat16())
    assert half.dtype == torch.bfloat16
    assert low_rank_down(q[:0], scale[:0], down).shape == (0, 24)


@outside
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("gated", [False, True])
def test_a_product_takes_the_update_before_gate_and_residual(problem, groups, backend, gated):
    p = problem(12, 48, 200)
    q, scale = quantize_activation(p["x"])
    low, up = _randn(12, groups * 16, seed=2), _randn(48, 16, seed=3)
    rest = (_randn(3, 4, 48), _randn(3, 48, seed=1)) if gated else (None, None)
    product = (q, scale, p["weight"], p["weight_scale"], torch.float32, p["bias"])
    expected = w2a8_matmul(*product) + _dense_update(low, up, groups)
    added = w2a8_matmul(*product)
    low_rank_add_(added, low, up)
    assert_close(added, expected, 1e-6)
    if gated:
        expected = (rest[0] + rest[1][:, None] * expected.view(3, 4, 48)).flatten(0, 1)
    assert_close(w2a8_matmul(*product, *rest, low, up, backend=backend), expected, 1e-6)


@outside
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_16_bit_product_takes_the_update(problem, groups, backend, dtype):
    p = problem(12, 48, 200, dtype=dtype)
    low, up = _randn(12, groups * 16, seed=2, dtype=dtype), _randn(48, 16, seed=3, dtype=dtype)
    product = (p["weight"], p["weight_scale"], p["bias"], p["input_scale"])
    expected = w2a16_linear(p["x"], *product).float() + _dense_update(low.float(), up.float(), groups)
    found = w2a16_low_rank(p["x"].view(3, 4, 200), *product, low, up, backend)
    assert (found.shape, found.dtype) == ((3, 4, 48), dtype)
    assert_close(found.flatten(0, 1), expected.to(dtype), 1e-6 if dtype == torch.float32 else 6e-3)


@outside
def test_opcheck(problem):
    p = problem(12, 48, 200)
    q, scale = quantize_activation(p["x"])
    ops = torch.ops.tritflow
    torch.library.opcheck(ops.low_rank_down.default, (q, scale, _randn(32, 200)))
    low, up = _randn(12, 48), _randn(48, 16)
    torch.library.opcheck(ops.low_rank_add_.default, (_randn(12, 48, seed=1), low, up))
    product = (q, scale, p["weight"], p["weight_scale"], torch.float32, p["bias"], None, None, low, up)
    torch.library.opcheck(ops.w2a8_matmul.default, product)
    product = (p["x"], p["weight"], p["weight_scale"], None, None, low, up)
    torch.library.opcheck(ops.w2a16_low_rank.default, product)


@outside
def test_compiles_without_a_graph_break(problem):
    p = problem(12, 48, 200)
    down, up = _randn(48, 200), _randn(48, 16)

    def f(x):
        q, scale = quantize_activation(x)
        low = low_rank_down(q, scale, down)
        y = w2a8_matmul(q, scale, p["weight"], p["weight_scale"], x.dtype, None, None, None, low, up)
        low_rank_add_(y, low, up)
        return y

    assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(p["x"]), f(p["x"]), 1e-6)


@outside
def test_wrong_arguments_are_named(problem):
    p = problem(12, 48, 200)
    q, scale = quantize_activation(p["x"])
    product = (q, scale, p["weight"], p["weight_scale"], torch.float32, None, None, None)
    low, up = _randn(12, 48), _randn(48, 16)
    with pytest.raises(ValueError, match="low and up come together"):
        w2a8_matmul(*product, low)
    with pytest.raises(ValueError, match="R a multiple of 16"):
        w2a8_matmul(*product, low, up[:, :8])
    with pytest.raises(ValueError, match="low must be"):
        w2a8_matmul(*product, low[:, :40], up)
    with pytest.raises(ValueError, match="S a divisor of 48 rows"):
        w2a8_matmul(*product, _randn(12, 80), up)
    with pytest.raises(ValueError, match=r"up must be torch\.float32"):
        w2a8_matmul(*product, low, up.bfloat16())
    with pytest.raises(ValueError, match="low must be"):
        w2a16_low_rank(p["x"], p["weight"], p["weight_scale"], None, None, low[:8], up)
    with pytest.raises(ValueError, match="contiguous matrix"):
        low_rank_add_(_randn(48, 12).t(), low, up)
    with pytest.raises(ValueError, match=r"down must be a float matrix \[columns, 200\]"):
        low_rank_down(q, scale, up)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn matrix"):
        low_rank_down(p["x"], scale, _randn(16, 200))
    with pytest.raises(ValueError, match=r"x_scale must have shape \[12\]"):
        low_rank_down(q, scale[:1], _randn(16, 200))


@inside
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16, 1), (37, 48, 300), (70, 80, 256)])
def test_down_kernel(kind, shape):
    from tritflow.kernels.triton.low_rank import low_rank_down as run

    tokens, columns, features = shape
    q, scale = reference.quantize_activation(_randn(tokens, features), None, kind)
    down = _randn(columns, features, seed=1)
    assert_close(run(q, scale, down), reference.low_rank_down(q, scale, down), 1e-5)
    assert run(q[:0], scale[:0], down).shape == (0, columns)


@inside
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("shape", [(1, 48, 16), (70, 300, 48), (65, 192, 32)])
def test_add_kernel(groups, shape):
    from tritflow.kernels.triton.low_rank import low_rank_add_ as run

    tokens, rows, rank = shape
    wide = _randn(tokens, groups * rank + 16, seed=1)  # several products' factors lie side by side
    y, low, up = _randn(tokens, rows), wide[:, 16:], _randn(rows, rank, seed=2)
    expected = y.clone()
    reference.low_rank_add_(expected, low, up)
    run(y, low, up)
    assert_close(y, expected, 1e-5)


@inside
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_product_kernel(problem, kind, groups, batch):
    from tritflow.kernels.triton import backend

    p = problem(12, 60, 200)  # tiles of 64 rows, so that one lies in all groups
    q, scale = reference.quantize_activation(p["x"], None, kind)
    low, up = _randn(12, groups * 32 + 16, seed=2)[:, 16:], _randn(60, 32, seed=3)
    rest = (_randn(batch, 12 // batch, 60), _randn(batch, 60, seed=1)) if batch else (None, None)
    args = (q, scale, p["weight"], p["weight_scale"], torch.float32, p["bias"], *rest, low, up)
    assert_close(backend.w2a8_matmul(*args), reference.w2a8_matmul(*args), 1e-5)
