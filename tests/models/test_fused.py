"""Inputs that are computed once in every form, and linears that are one product where they can be."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

from tritflow.kernels import adaln, quantize_activation
from tritflow.models.fused import Activated, Modulated, Projection, Rows, separate_
from tritflow.modules import TernaryLinear
from tritflow.testing import assert_close, random_linear


def _ternary(out_features, seed=0, columns=None, **kwargs):
    g = torch.Generator().manual_seed(seed)
    trits = torch.randint(-1, 2, (out_features, 48), generator=g, dtype=torch.int8)
    linear = random_linear(48, out_features, seed=seed)
    return TernaryLinear.from_linear(linear, trits, torch.rand(out_features, generator=g), columns, **kwargs)


def _x(seed=0):
    return torch.randn(2, 5, 48, generator=torch.Generator().manual_seed(seed))


def test_every_form_is_computed_once(monkeypatch):
    x, vector = _x(), torch.rand(2, 48)
    rows = Modulated(x, vector, vector, 1e-6)
    full = rows.full()
    assert torch.equal(full, adaln(x, vector, vector))
    assert rows.full() is full
    q = rows.quantized("int8", None)
    assert rows.quantized("int8", None) is q
    columns = torch.rand(48)
    assert rows.quantized("int8", columns) is not q
    assert rows.quantized("float8_e4m3fn", None)[0].dtype == torch.float8_e4m3fn
    assert torch.equal(q[0], quantize_activation(full)[0])


@pytest.mark.parametrize("form", ["full", "quantized"])
def test_a_source_is_let_go_once_it_was_read(form):
    x = _x() * 1
    gone = weakref.ref(x)
    rows, kept = Activated(x, once=True), Activated(x)
    expected = kept.full() if form == "full" else kept.quantized("int8", None)[0]
    found = rows.full() if form == "full" else rows.quantized("int8", None)[0]
    assert torch.equal(found, expected)
    del kept, x
    gc.collect()
    assert gone() is None
    assert rows.full() is found if form == "full" else rows.quantized("int8", None)[0] is found


@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_alike_neighbours_are_one_product(mode):
    columns = torch.rand(48).bfloat16() + 0.5
    linears = [_ternary(n, seed=n, columns=columns.clone(), mode=mode) for n in (24, 40, 8)]
    expected = torch.cat([linear(_x()) for linear in linears], dim=-1)
    joint = Projection(*linears)
    assert len(joint.parts) == 1
    assert_close(joint(Rows(_x())), expected, 1e-6)
    assert_close(torch.cat([linear(_x()) for linear in linears], dim=-1), expected, 1e-6)
    for linear in linears:
        separate_(linear)
        assert linear.packed.untyped_storage().nbytes() == linear.packed.nbytes


@pytest.mark.parametrize(
    "other",
    [
        {"mode": "w2a16"},
        {"activation_dtype": "float8_e4m3fn"},
        {"backend": "reference"},
        {"columns": torch.full((48,), 0.5)},
    ],
)
def test_layers_that_differ_stay_apart(other):
    linears = [_ternary(24, mode="w2a8"), _ternary(8, seed=1, **{"mode": "w2a8", **other}), nn.Linear(48, 16)]
    apart = Projection(*linears)
    assert len(apart.parts) == 3
    expected = torch.cat([linear(_x()) for linear in linears], dim=-1)
    residual, gate = torch.randn(2, 5, 48), torch.randn(2, 48)
    with torch.no_grad():
        assert_close(apart(Rows(_x())), expected, 1e-6)
        assert_close(apart(Rows(_x()), residual, gate), residual + gate[:, None] * expected, 1e-6)
