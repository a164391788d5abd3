"""8-bit attention: the operation and its reference, against attention in float64."""

import pytest
import torch
from torch.library import opcheck

from tritflow.kernels import BackendError, attention, normed_attention, qk_norm_rope
from tritflow.kernels import attention_reference as reference
from tritflow.testing import relative_error

ERROR = {"int8": 0.045, "float8_e4m3fn": 0.06}
"""Stated tolerance on Gaussian inputs: what rounding queries, keys, values and weights to 8 bits does."""


def inputs(*shape, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=g).to(dtype) for _ in range(3))


def exact(q, k, v, scale=None):
    q, k, v = (t.double().transpose(1, 2) for t in (q, k, v))
    logits = q @ k.transpose(2, 3) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (torch.softmax(logits, -1) @ v).transpose(1, 2)


@pytest.mark.parametrize("kind", ERROR)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 37, 3, 24), (1, 128, 1, 64), (1, 300, 2, 128), (1, 1100, 1, 32)])
def test_error_is_within_the_stated_tolerance(shape, kind):
    args = inputs(*shape)
    found = attention(*args, kind)
    assert (found.shape, found.dtype) == (shape, torch.float32)
    assert relative_error(found, exact(*args)) < ERROR[kind]


@pytest.mark.parametrize("kind", ERROR)
def test_what_all_keys_share_costs_nothing(kind):
    q, k, v = inputs(1, 256, 2, 64)
    shared = torch.zeros(64)
    shared[::16] = 30
    found = attention(q, k + shared, v, kind)
    assert relative_error(found, exact(q, k + shared, v)) < 1.1 * ERROR[kind]


def test_values_of_very_different_blocks():
    """A block's scale counts as part of its weights: neither large nor small blocks are lost."""
    q, k, v = inputs(1, 384, 1, 64)
    v[:, :128] *= 1000
    v[:, 128:256] *= 1e-3
    v[:, 256:] = 0
    assert relative_error(attention(q, k, v), exact(q, k, v)) < ERROR["int8"]
    k[:, 128:256] = q.mean(1, keepdim=True) * 0 + 5  # only the small block is looked at
    q = q.abs()
    assert relative_error(attention(q, k, v), exact(q, k, v)) < ERROR["int8"]
    assert torch.equal(attention(q, k, torch.zeros_like(v)), torch.zeros_like(v))


def test_one_key_that_counts_alone_gives_its_value():
    q, k, v = inputs(1, 200, 1, 32)
    v = v.mul(4).round()  # at most 16 in magnitude, so exact in e4m3
    k[0, 150] = q[0, 3] * 100
    found = attention(q, k, v)
    assert relative_error(found[0, 3], v[0, 150]) < 0.07  # one weight's rounding


def test_scale_and_dtypes():
    q, k, v = inputs(1, 130, 2, 64)
    assert relative_error(attention(q, k, v, scale=0.05), exact(q, k, v, 0.05)) < ERROR["int8"]
    for dtype in (torch.bfloat16, torch.float16):
        half = tuple(t.to(dtype) for t in (q, k, v))
        found = attention(*half)
        assert found.dtype == dtype
        assert relative_error(found, exact(*half)) < ERROR["int8"]


def test_strides_and_nothing_at_all():
    joint = torch.randn(2, 40, 3, 2, 16)
    q, k, v = joint.unbind(2)
    assert torch.equal(attention(q, k, v), attention(*(t.contiguous() for t in (q, k, v))))
    assert attention(q[:0], k[:0], v[:0]).shape == (0, 40, 2, 16)
    assert attention(q[:, :0], k[:, :0], v[:, :0]).shape == (2, 0, 2, 16)


def test_batches_and_heads_do_not_see_each_other():
    q, k, v = inputs(2, 150, 3, 32)
    whole = attention(q, k, v)
    for b in range(2):
        for h in range(3):
            alone = attention(*(t[b : b + 1, :, h : h + 1] for t in (q, k, v)))
            assert relative_error(alone, whole[b : b + 1, :, h : h + 1]) < 1e-3


def test_blocks_of_queries_agree(monkeypatch):
    args = inputs(1, 300, 1, 32)
    whole = reference.attention(*args)
    monkeypatch.setattr(reference, "_ROWS", 64)
    assert relative_error(reference.attention(*args), whole) < 1e-3


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_is_seen(which):
    args = inputs(1, 200, 2, 32)
    args[which][0, 150, 0, 3] = float("nan")
    found = attention(*args)
    assert found[0, 150, 0].isnan().any()
    assert not found[0, :, 1].isnan().any()


@pytest.mark.parametrize("kind", ERROR)
def test_opcheck(kind):
    args = inputs(1, 40, 2, 16)
    opcheck(torch.ops.tritflow.attention.default, (*args, kind))


def test_compiles_without_a_graph_break():
    args = inputs(1, 40, 2, 16)
    compiled = torch.compile(lambda q, k, v: attention(q, k, v) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), attention(*args) * 2)


def test_a_head_that_no_kernel_takes_runs_on_the_reference():
    q, k, v = inputs(1, 20, 2, 24)
    assert torch.equal(attention(q, k, v), reference.attention(q, k, v))


def test_user_errors_say_what_is_wrong():
    q, k, v = inputs(1, 10, 2, 16)
    with pytest.raises(ValueError, match=r"k must be like q"):
        attention(q, k[:, :5], v)
    with pytest.raises(ValueError, match=r"v must be like q"):
        attention(q, k, v.half())
    with pytest.raises(ValueError, match="q must be a float tensor"):
        attention(q.int(), k.int(), v.int())
    with pytest.raises(ValueError, match="'int4' is not one of"):
        attention(q, k, v, "int4")
    with pytest.raises(BackendError, match="triton"):
        attention(q, k, v, backend="triton")


def projected(tokens, context, heads, features, dtype=torch.float32):
    """Arguments of `normed_attention` up to eps: three projections side by side, two streams, tables by pairs."""
    g = torch.Generator().manual_seed(0)

    def three(rows):
        return torch.randn(2, rows, 3, heads, features, generator=g).to(dtype).unbind(2)

    angles = torch.randn(tokens + context, features // 2, generator=g)
    w = [(torch.rand(features, generator=g) + 0.5).to(dtype) for _ in range(4)]
    streams = three(tokens)
    rest = (*three(context), *w[2:]) if context else (None,) * 5
    return (*streams, *w[:2], angles.cos(), angles.sin(), *rest)


@pytest.mark.parametrize("context", [0, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normed_attention_is_norm_rotation_and_attention(dtype, context):
    args = projected(40, context, 2, 32, dtype)
    whole = [t.repeat_interleave(2, dim=1) for t in args[5:7]]
    q, k = qk_norm_rope(*args[:2], *args[3:5], *whole, *args[7:9], *args[10:12])
    v = args[2] if not context else torch.cat([args[9], args[2]], dim=1)
    for kind in ERROR:
        found = normed_attention(*args, dtype=kind)
        assert (found.shape, found.dtype) == ((2, 40 + context, 2, 32), dtype)
        # In bf16 the composition rounds queries and keys once more, so that some fall to other 8-bit numbers.
        assert relative_error(found, attention(q, k, v, kind)) < (1e-5 if dtype == torch.float32 else ERROR[kind])
        assert torch.equal(found, normed_attention(*args[:5], *whole, *args[7:], dtype=kind))
    scaled = normed_attention(*args, scale=0.05)
    assert relative_error(scaled, attention(q, k, v, scale=0.05)) < 0.02
    assert not torch.equal(scaled, normed_attention(*args))


@pytest.mark.parametrize("context", [0, 9])
def test_normed_attention_as_an_op(context):
    args = projected(20, context, 2, 16)
    opcheck(torch.ops.tritflow.normed_attention.default, args)
    compiled = torch.compile(lambda *a: normed_attention(*a) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), normed_attention(*args) * 2)


def test_wrong_arguments_of_normed_attention_are_named():
    args = list(projected(20, 9, 2, 16))
    with pytest.raises(ValueError, match="come together"):
        normed_attention(*args[:9], None, *args[10:])
    with pytest.raises(ValueError, match="context_v"):
        normed_attention(*args[:9], args[9][:, :5], *args[10:])
    with pytest.raises(ValueError, match="cos must have shape"):
        normed_attention(*args[:5], args[5][:, :3], *args[6:])
    with pytest.raises(ValueError, match="norm weights"):
        normed_attention(*args[:3], args[3][:5], *args[4:])
    with pytest.raises(ValueError, match="v must be like q"):
        normed_attention(*args[:2], args[2].half(), *args[3:])
    with pytest.raises(BackendError, match="triton"):
        normed_attention(*args, backend="triton")
