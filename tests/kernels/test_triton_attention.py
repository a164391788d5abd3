"""Plain Triton's 8-bit attention through the interpreter, against the reference; tests/gpu has it on a GPU.

The interpreter of Triton 3.6 loses the carry when it rounds a number up into the next power of two as e4m3, so what
passes e4m3 there is compared loosely, or with numbers that e4m3 holds.
"""

from __future__ import annotations

import pytest
from interpreter import inside

pytest.importorskip("triton")


SHAPES = [(1, 1, 1, 32), (2, 150, 2, 32), (1, 128, 1, 64), (1, 257, 1, 128)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Outputs start as NaN or nonsense, so that an element nobody wrote is seen."""
    import torch

    from tritflow.kernels.triton import attention

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        if out.dtype == torch.float8_e4m3fn:
            out.view(torch.uint8).fill_(0x7F)
            return out
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(77)

    real = torch.empty
    monkeypatch.setattr(attention.torch, "empty", empty)


def _inputs(shape, seed=0):
    import torch

    g = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(shape, generator=g) for _ in range(3))
    return q, k + 3 * torch.randn(shape[-1], generator=g), v


def _exact(q, k, v):
    import torch.nn.functional as F

    return F.scaled_dot_product_attention(*(t.double().transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


@inside
@pytest.mark.parametrize("shape", SHAPES)
def test_with_values_in_16_bits(shape):
    from tritflow.kernels.triton.attention import attention
    from tritflow.testing import relative_error

    args = _inputs(shape)
    assert relative_error(attention(*args, e4m3=False), _exact(*args)) < 0.015


@inside
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", SHAPES)
def test_with_values_in_e4m3(shape, kind):
    from tritflow.kernels.triton.attention import attention
    from tritflow.testing import relative_error

    args = _inputs(shape)
    assert relative_error(attention(*args, kind), _exact(*args)) < 0.2


@inside
def test_keys_are_the_references():
    import torch

    from tritflow.kernels import attention_reference as reference
    from tritflow.kernels.triton.attention_inputs import quantize

    _, k, v = _inputs((2, 150, 3, 32))
    _, k8, _, _, scale, _ = quantize(None, k, v, "int8")
    found = (k8.view(2, 3, 256, 32).float() * scale.view(2, 3, 2).repeat_interleave(128, 2)[..., None]).transpose(1, 2)
    assert not found[:, 150:].any()
    step = scale.max()
    wrong = (found[:, :150] - reference.quantize_keys(k, "int8")).abs()
    assert wrong.max() < 1.01 * step
    assert (wrong > step / 2).float().mean() < 0.001
    assert torch.equal(scale, scale.abs())


@inside
def test_values_are_the_references_in_another_order():
    import torch

    from tritflow.kernels import attention_reference as reference
    from tritflow.kernels.triton.attention_inputs import quantize

    g = torch.Generator().manual_seed(0)
    k = torch.randn(2, 150, 3, 32, generator=g)
    v = torch.randint(-8, 9, k.shape, generator=g).float()  # exact in e4m3
    _, _, v8, _, _, exponent = quantize(None, k, v, "int8")
    expected, exponents = reference.quantize_values(v)
    assert torch.equal(exponent.view(2, 3, 2).repeat_interleave(128, 2)[..., :150], exponents)
    places = torch.arange(256).view(16, 2, 4, 2).permute(0, 2, 1, 3).reshape(256)
    found = torch.empty(2, 3, 32, 256)
    found[..., places] = v8.view(2, 3, 32, 256).float()
    assert not found[..., 150:].any()
    assert torch.equal(found[..., :150].permute(0, 3, 1, 2), expected)


@inside
@pytest.mark.parametrize("e4m3", [True, False])
def test_one_key_that_counts_alone_gives_its_value(e4m3):
    """Were keys and values in different orders, another key's value would come out."""
    import torch

    from tritflow.kernels.triton.attention import attention
    from tritflow.testing import relative_error

    tokens = 140
    k = torch.randn(1, tokens, 1, 128, generator=torch.Generator().manual_seed(0))
    q = 20 * k
    v = torch.randint(-8, 9, k.shape, generator=torch.Generator().manual_seed(1)).float()
    assert relative_error(attention(q, k, v, e4m3=e4m3), v) < (0.1 if e4m3 else 1e-3)


@inside
@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_nan_is_seen(which):
    from tritflow.kernels.triton.attention import attention

    args = _inputs((1, 140, 2, 32))
    args[which][0, 100, 0, 3] = float("nan")
    found = attention(*args)
    assert found[0, 100, 0].isnan().any()
    assert not found[0, :, 1].isnan().any()


@inside
def test_strided_inputs():
    import torch

    from tritflow.kernels.triton.attention import attention

    q, k, v = torch.randn(2, 40, 3, 2, 32).unbind(2)
    assert torch.equal(attention(q, k, v), attention(*(t.contiguous() for t in (q, k, v))))


def _projected(tokens, context, heads, features, seed=0):
    """Arguments of `normed_attention` as a block has them: q, k and v side by side, two streams, tables by pairs."""
    import torch

    g = torch.Generator().manual_seed(seed)

    def three(rows):
        return torch.randn(2, rows, 3, heads, features, generator=g).unbind(2)

    angles = torch.randn(tokens + context, features // 2, generator=g)
    w = [torch.rand(features, generator=g) + 0.5 for _ in range(4)]
    streams = three(tokens)
    rest = (*three(context), *w[2:]) if context else (None,) * 5
    return (*streams, *w[:2], angles.cos(), angles.sin(), *rest)


def _whole(args):
    import torch

    return (*args[:5], *(torch.repeat_interleave(t, 2, dim=1) for t in args[5:7]), *args[7:])


@inside
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("tokens", "context"), [(150, 0), (150, 20), (128, 0), (150, 128), (200, 56)])
def test_normed_and_turned_on_the_way(kind, tokens, context):
    """The same 8 bits as from normed and turned queries and keys that went to memory in float32."""
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.attention_inputs import normed_quantize, quantize
    from tritflow.testing import assert_close

    args = _projected(tokens, context, 2, 32)
    whole = _whole(args)
    q, k = reference.qk_norm_rope(*args[:2], *whole[3:9], *args[10:12])
    v = args[2] if not context else torch.cat([args[9], args[2]], dim=1)
    expected = quantize(q, k, v, kind)
    for given in (args, whole):
        found = normed_quantize(*given, dtype=kind)
        for name, a, b in zip(found._fields, found, expected, strict=True):
            if name in ("q_scale", "k_scale"):
                assert_close(a[a.isfinite() & (b > 1e-20)], b[b > 1e-20], 1e-5)
            elif name == "v_exponent":
                assert torch.equal(a, b)
            else:
                a, b = a.float(), b.float()
                assert (a != b).float().mean() < 0.01, name
                if kind == "int8":
                    assert (a - b).abs().max() <= 1, name
    small = normed_quantize(*args, dtype=kind, query_max=1.0)
    top = small.q8.float().view(2, 2, -1, 32).abs().amax(-1)
    assert ((top == 1) | (top == 0)).all()


@inside
@pytest.mark.parametrize("context", [0, 20])
def test_normed_attention_is_the_references(context):
    import torch

    from tritflow.kernels import attention_reference as reference
    from tritflow.kernels.reference import qk_norm_rope
    from tritflow.kernels.triton.attention import attention
    from tritflow.kernels.triton.backend import BACKEND
    from tritflow.testing import relative_error

    args = (*_projected(150, context, 2, 64, seed=1), 1e-6, "int8", None)
    run = BACKEND.kernels["normed_attention"]
    assert run.supports(*args)
    found = run.run(*args)
    assert found.shape == (2, 150 + context, 2, 64)
    assert relative_error(found, reference.normed_attention(*args)) < 0.2  # the interpreter's e4m3, see the top
    whole = _whole(args[:12])
    q, k = qk_norm_rope(*args[:2], *whole[3:9], *args[10:12])
    v = args[2] if not context else torch.cat([args[9], args[2]], dim=1)
    assert relative_error(found, attention(q, k, v)) < 0.02
    wide = (*_whole(args[:12]), *args[12:])
    assert relative_error(run.run(*wide), found) < 1e-6
    none = (*(t[:0] for t in args[:3]), *args[3:7], *(None,) * 5, *args[12:])
    assert run.run(*none).shape[0] == 0


@inside
@pytest.mark.parametrize("which", [0, 1, 2, 7, 8, 9])
def test_a_nan_is_seen_through_norm_and_rotation(which):
    from tritflow.kernels.triton.backend import BACKEND

    args = (*_projected(140, 20, 2, 32), 1e-6, "int8", None)
    at = 15 if which > 6 else 100
    args[which][0, at, 0, 3] = float("nan")
    found = BACKEND.kernels["normed_attention"].run(*args)
    assert found[0, at if which > 6 else at + 20, 0].isnan().any()
    assert not found[0, :, 1].isnan().any()


def test_sizes_that_the_kernel_takes():
    import torch

    from tritflow.kernels.triton.backend import BACKEND

    def takes(features, dtype=torch.bfloat16, kind="int8"):
        x = torch.empty(1, 2, 1, features, dtype=dtype)
        return BACKEND.kernels["attention"].supports(x, x, x, kind, None)

    assert [d for d in range(1, 513) if takes(d)] == [32, 64, 128, 256]
    assert takes(64, torch.float32, "float8_e4m3fn")
    assert not takes(64, torch.float64)
