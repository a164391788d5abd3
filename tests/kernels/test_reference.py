from __future__ import annotations

import pytest
import torch

from tritflow.kernels import reference
from tritflow.testing import assert_close


def test_quantize_follows_its_equation_in_float64(problem):
    p = problem(33, 4, 70)
    q, scale = reference.quantize_activation(p["x"], p["input_scale"])
    values = p["x"].double() * p["input_scale"].double()
    expected = values.abs().amax(1) / 127
    assert_close(scale, expected, 1e-6)
    exact = values / expected[:, None]
    assert (q.double() - exact).abs().max() <= 0.5 + 1e-4
    assert q.abs().amax(1).eq(127).all()


def test_quantize_rounds_half_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]])
    q, scale = reference.quantize_activation(x)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2]]
    assert scale.tolist() == [1.0]


def test_quantize_of_zero_rows_and_of_poison():
    x = torch.tensor([[0.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]])
    q, scale = reference.quantize_activation(x)
    assert q[0].tolist() == [0, 0]
    assert torch.isfinite(scale[0])
    assert not torch.isfinite(scale[1:]).any()  # so the output is poisoned too


def test_e4m3_error_is_that_of_three_mantissa_bits(problem):
    p = problem(64, 4, 256)
    q, scale = reference.quantize_activation(p["x"], dtype="float8_e4m3fn")
    assert q.dtype == torch.float8_e4m3fn
    assert q.float().abs().amax(1).eq(448).all()
    back = q.float() * scale[:, None]
    normal = back.abs() > scale[:, None] * 2**-6
    assert ((back - p["x"]).abs() <= p["x"].abs() * 2**-4)[normal].all()


@pytest.mark.parametrize("seed", range(20))
def test_int8_sums_equal_int64(problem, seed):
    g = torch.Generator().manual_seed(1000 + seed)
    m, n, k = (int(torch.randint(1, high, (1,), generator=g)) for high in (9, 40, 700))
    p = problem(m, n, k, seed=seed)
    q = torch.randint(-127, 128, (m, k), generator=g, dtype=torch.int8)
    assert torch.equal(reference.integer_product(q, p["weight"]).long(), q.long() @ p["trits"].long().t())


def test_int8_sums_stay_exact_beyond_what_float32_holds(problem, monkeypatch):
    monkeypatch.setattr(reference, "_EXACT_K", 100)
    p = problem(3, 5, 230)
    q = torch.full((3, 230), 127, dtype=torch.int8)
    assert torch.equal(reference.integer_product(q, p["weight"]).long(), q.long() @ p["trits"].long().t())


def test_linears_against_float64(problem):
    p = problem(17, 24, 200)
    dense = p["weight_scale"].double()[:, None] * p["trits"].double() * p["input_scale"].double()
    expected = p["x"].double() @ dense.t() + p["bias"].double()
    args = (p["weight"], p["weight_scale"], p["bias"], p["input_scale"])
    assert_close(reference.w2a16_linear(p["x"], *args), expected, 1e-6)
    assert_close(reference.w2a8_linear(p["x"], *args), expected, 1e-2)
    assert_close(reference.w2a8_linear(p["x"], *args, "float8_e4m3fn"), expected, 4e-2)
    assert_close(reference.dequantize(p["weight"], 200, p["weight_scale"], p["input_scale"]), dense, 1e-6)
    assert reference.w2a16_linear(p["x"].double(), *args).dtype == torch.float64
