"""The fused block operations: what they compute, their shapes under tracing, and every backend of this machine."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tritflow.kernels import (
    adaln,
    adaln_quantize,
    gated_residual,
    gelu,
    gelu_quantize,
    qk_norm_rope,
    quantize_activation,
    reference,
    w2a8_linear,
    w2a8_matmul,
)
from tritflow.testing import assert_close

OPS = torch.ops.tritflow
KINDS = list(reference.QMAX)


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _modulated(batch=2, tokens=5, features=70, dtype=torch.float32):
    x = _randn(batch, tokens, features, dtype=dtype) * 3 + 1
    return x, _randn(batch, features, seed=1, dtype=dtype), _randn(batch, features, seed=2, dtype=dtype)


def _rope_inputs(batch=2, tokens=6, context=3, heads=3, features=8, dtype=torch.float32):
    wide = _randn(batch, tokens, 3 * heads * features, dtype=dtype)  # q, k, v side by side, as a fused layer gives them
    q, k, _ = wide.view(batch, tokens, 3, heads, features).unbind(2)
    angles = _randn(tokens + context, features // 2, seed=3).repeat_interleave(2, dim=1)
    weights = [_randn(features, seed=s, dtype=dtype) for s in (4, 5, 6, 7)]
    args = [q, k, *weights[:2], angles.cos(), angles.sin()]
    if context:
        before = _randn(batch, context, 2, heads, features, seed=8, dtype=dtype)
        args += [before[:, :, 0], before[:, :, 1], *weights[2:]]
    return args


def _stock_rope(x, cos, sin):
    from diffusers.models.embeddings import apply_rotary_emb

    return apply_rotary_emb(x, (cos, sin), sequence_dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adaln_is_layer_norm_and_modulation(dtype):
    x, shift, scale = _modulated(dtype=dtype)
    expected = F.layer_norm(x.double(), (70,), eps=1e-6) * (1 + scale.double())[:, None] + shift.double()[:, None]
    assert_close(adaln(x, shift, scale), expected.to(dtype), 1e-6 if dtype == torch.float32 else 4e-3)
    assert adaln(x, shift, scale).dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_adaln_quantize_is_both_in_one(kind):
    x, shift, scale = _modulated()
    columns = torch.rand(70) + 0.5
    for c in (None, columns):
        q, s = adaln_quantize(x, shift, scale, c, kind)
        expected = quantize_activation(adaln(x, shift, scale), c, kind)
        assert torch.equal(q.view(torch.int8), expected[0].view(torch.int8))
        assert torch.equal(s, expected[1])
        assert (q.dtype, q.shape, s.shape) == (reference.QTYPE[kind], (10, 70), (10,))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [0, 24])
def test_gelu_quantize_is_both_in_one(kind, width):
    x, prefix = _randn(2, 3, 50), _randn(2, 3, 24, seed=1) if width else None
    columns = torch.rand(50 + width) + 0.5
    whole = F.gelu(x, approximate="tanh")
    whole = whole if prefix is None else torch.cat([prefix, whole], dim=-1)
    assert torch.equal(gelu(x, prefix), whole)
    q, s = gelu_quantize(x, prefix, columns, kind)
    expected = quantize_activation(whole, columns, kind)
    assert torch.equal(q.view(torch.int8), expected[0].view(torch.int8))
    assert torch.equal(s, expected[1])


@pytest.mark.parametrize("context", [0, 3])
def test_norm_and_rotation_are_those_of_the_stock_model(context):
    args = _rope_inputs(context=context)
    q, k, q_weight, k_weight, cos, sin = args[:6]
    q, k = F.rms_norm(q, (8,), q_weight, 1e-6), F.rms_norm(k, (8,), k_weight, 1e-6)
    if context:
        cq, ck, cq_weight, ck_weight = args[6:]
        q = torch.cat([F.rms_norm(cq, (8,), cq_weight, 1e-6), q], dim=1)
        k = torch.cat([F.rms_norm(ck, (8,), ck_weight, 1e-6), k], dim=1)
    found = qk_norm_rope(*args)
    assert_close(found[0], _stock_rope(q, cos, sin), 1e-6)
    assert_close(found[1], _stock_rope(k, cos, sin), 1e-6)


def test_gated_residual():
    x, gate, _ = _modulated()
    y = _randn(2, 5, 70, seed=9)
    assert_close(gated_residual(x, gate, y), x + gate[:, None] * y, 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_matmul_on_quantized_rows_equals_the_linear(problem, kind):
    p = problem(12, 24, 200)
    linear = (p["weight"], p["weight_scale"])
    q, scale = quantize_activation(p["x"], p["input_scale"], kind)
    expected = w2a8_linear(p["x"], *linear, p["bias"], p["input_scale"], kind)
    found = w2a8_matmul(q, scale, *linear, torch.float32, p["bias"])
    assert_close(found, expected, 1e-6)
    residual, gate = _randn(3, 4, 24), _randn(3, 24, seed=1)
    found = w2a8_matmul(q, scale, *linear, torch.float32, p["bias"], residual, gate)
    assert_close(found, (residual + gate[:, None] * expected.view(3, 4, 24)).flatten(0, 1), 1e-6)
    assert w2a8_matmul(q[:0], scale[:0], *linear, torch.bfloat16).shape == (0, 24)


@pytest.mark.parametrize("out_features", [24, 2000])
def test_the_cpu_backend_agrees_with_the_reference(problem, out_features):
    from tritflow.modules import PackedWeight

    p = problem(40, out_features, 640)
    q, scale = quantize_activation(p["x"])
    weight = PackedWeight(p["weight"], in_features=640)
    args = (q, scale, weight, p["weight_scale"], torch.float32, p["bias"])
    expected = w2a8_matmul(*args, backend="reference")
    for _ in range(2):  # the second time the expanded form is there
        assert_close(w2a8_matmul(*args), expected, 1e-6)
    assert weight.expansion.bytes == out_features * 640


def test_opcheck(problem):
    x, shift, scale = _modulated()
    torch.library.opcheck(OPS.adaln.default, (x, shift, scale))
    torch.library.opcheck(OPS.gated_residual.default, (x, shift, x + 1))
    for kind in KINDS:
        torch.library.opcheck(OPS.adaln_quantize.default, (x, shift, scale, torch.rand(70), kind))
        torch.library.opcheck(OPS.gelu_quantize.default, (x, x * 2, None, kind))
    torch.library.opcheck(OPS.gelu.default, (x, x * 2))
    torch.library.opcheck(OPS.qk_norm_rope.default, tuple(_rope_inputs()))
    torch.library.opcheck(OPS.qk_norm_rope.default, tuple(_rope_inputs(context=0)))
    p = problem(12, 24, 200)
    q, s = quantize_activation(p["x"])
    plain = (q, s, p["weight"], p["weight_scale"], torch.bfloat16, p["bias"])
    torch.library.opcheck(OPS.w2a8_matmul.default, plain)
    residual = _randn(3, 4, 24, dtype=torch.bfloat16)
    torch.library.opcheck(OPS.w2a8_matmul.default, (*plain, residual, residual[:, 0]))


def test_compiles_without_a_graph_break(problem):
    p = problem(10, 70, 70)

    def f(x, shift, scale, args):
        q, s = adaln_quantize(x, shift, scale)
        y = w2a8_matmul(q, s, p["weight"], p["weight_scale"], x.dtype, p["bias"], x, shift).view(x.shape)
        q, s = gelu_quantize(y, x)
        return gated_residual(adaln(y, shift, scale), shift, x), q.float().sum() + s.sum(), qk_norm_rope(*args)

    inputs = (*_modulated(), _rope_inputs())
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*inputs), f(*inputs), strict=True):
        pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
        for a, b in pairs:
            assert_close(a, b, 1e-5)


def test_no_tokens_and_strange_strides():
    x, shift, scale = _modulated()
    assert adaln(x[:, :0], shift, scale).shape == (2, 0, 70)
    assert adaln_quantize(x[:, :0], shift, scale)[0].shape == (0, 70)
    assert gelu_quantize(x[:0])[1].shape == (0,)
    assert gated_residual(x[:, :0], shift, x[:, :0]).shape == (2, 0, 70)
    q, k, *rest = _rope_inputs(context=0)
    assert qk_norm_rope(q[:, :0], k[:, :0], *rest[:2], rest[2][:0], rest[3][:0])[0].shape == (2, 0, 3, 8)
    turned = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert_close(adaln(turned, shift, scale), adaln(x, shift, scale), 1e-6)
    assert torch.equal(gelu_quantize(turned)[0], gelu_quantize(x)[0])


def test_wrong_arguments_are_named(problem):
    x, shift, scale = _modulated()
    with pytest.raises(ValueError, match=r"shift must have shape \[2, 70\]"):
        adaln(x, shift[:1], scale)
    with pytest.raises(ValueError, match=r"\[batch, tokens, features\]"):
        adaln(x[0], shift, scale)
    with pytest.raises(ValueError, match="int4"):
        adaln_quantize(x, shift, scale, None, "int4")
    with pytest.raises(ValueError, match=r"input_scale must have shape \[70\]"):
        adaln_quantize(x, shift, scale, torch.rand(3))
    with pytest.raises(ValueError, match="prefix must be"):
        gelu_quantize(x, x[:1])
    with pytest.raises(ValueError, match="y must be"):
        gated_residual(x, shift, x[:, :2])
    args = _rope_inputs()
    with pytest.raises(ValueError, match="come together"):
        qk_norm_rope(*args[:7])
    with pytest.raises(ValueError, match="cos must have shape"):
        qk_norm_rope(*args[:4], args[4][:2], *args[5:])
    with pytest.raises(ValueError, match="context_q must be like q"):
        qk_norm_rope(*args[:6], args[6][:1], *args[7:])
    with pytest.raises(ValueError, match="norm weights"):
        qk_norm_rope(*args[:2], args[2][:1], *args[3:])
    p = problem(12, 24, 200)
    q, s = quantize_activation(p["x"])
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn matrix"):
        w2a8_matmul(p["x"], s, p["weight"], p["weight_scale"], torch.float32)
    with pytest.raises(ValueError, match=r"x_scale must have shape \[12\]"):
        w2a8_matmul(q, s[:1], p["weight"], p["weight_scale"], torch.float32)
    with pytest.raises(ValueError, match="residual must be"):
        w2a8_matmul(
            q, s, p["weight"], p["weight_scale"], torch.float32, None, torch.zeros(1, 3, 24), torch.zeros(1, 24)
        )
    with pytest.raises(ValueError, match="come together"):
        w2a8_matmul(q, s, p["weight"], p["weight_scale"], torch.float32, None, torch.zeros(1, 12, 24))
