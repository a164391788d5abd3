"""The block kernels through Triton's interpreter, against the reference; tests/gpu has them on a GPU."""

from __future__ import annotations

import pytest
from interpreter import inside

pytest.importorskip("triton")


@pytest.fixture
def poisoned(monkeypatch):
    """Outputs start as NaN or nonsense, so that an element nobody wrote is seen."""
    import torch

    from tritflow.kernels.triton import adaln, block, expand, gemm

    def empty(*args, **kwargs):
        out = real(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() and out.itemsize > 1 else out.fill_(77)

    real = torch.empty
    for module in (adaln, block, expand, gemm):
        monkeypatch.setattr(module.torch, "empty", empty)


def _randn(*shape, seed=0):
    import torch

    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _same_quantized(found, expected, tolerance=1e-6):
    """Equal but for the last bit of a mean: integers at most one apart, and seldom."""
    import torch

    from tritflow.testing import assert_close

    assert_close(found[1], expected[1], tolerance)
    q, e = found[0].float(), expected[0].float()
    if found[0].dtype == torch.int8:
        assert (q - e).abs().max() <= 1
    assert (q != e).float().mean() < 0.01


def _modulated(shape, seed=1):
    """Tokens inside a wider tensor, and modulation as slices of one row."""
    batch, tokens, features = shape
    table = _randn(batch, 3 * features, seed=seed)
    wide = _randn(batch, tokens + 4, features + 6)
    x = wide[:, 2 : tokens + 2, 3 : features + 3]
    x.copy_(_randn(*shape) * 3 + 1)
    return x, table[:, :features], table[:, 2 * features :]


@inside
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 2), (2, 5, 70), (1, 3, 1300)])
def test_adaln(poisoned, shape, columns):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.adaln import adaln, adaln_quantize
    from tritflow.testing import assert_close

    wide, shift, scale = _modulated(shape)
    x = wide.contiguous()
    c = torch.rand(shape[2]) + 0.5 if columns else None
    for given in (x, wide):
        assert_close(adaln(given, shift, scale), reference.adaln(x, shift, scale), 1e-5)
        _same_quantized(adaln_quantize(given, shift, scale, c), reference.adaln_quantize(x, shift, scale, c, "int8"))


@inside
@pytest.mark.parametrize("index", range(6))
def test_every_setting_of_adaln(poisoned, index):
    """Batches, a last program and a last piece that are not full, a mean of 300 deviations, a NaN."""
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.adaln import TILES, adaln_quantize

    assert len(TILES) == 6
    for shape in ((2, 11, 1100), (1, 4, 3072)):
        x, shift, scale = _modulated(shape)
        for given in (x, x + 900):
            found = adaln_quantize(given, shift, scale, tile=TILES[index])
            _same_quantized(found, reference.adaln_quantize(given, shift, scale, None, "int8"), 1e-5)
    x[0, 1, 5] = float("nan")
    _, found = adaln_quantize(x, shift, scale, tile=TILES[index])
    assert torch.equal(found.isnan(), torch.tensor([False, True, False, False]))


@inside
@pytest.mark.parametrize(("features", "width"), [(50, 0), (1, 3), (1000, 300)])
def test_gelu_quantize(poisoned, features, width):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton import block
    from tritflow.testing import assert_close

    x = _randn(2, 3, features + 7)[..., 4 : features + 4] * 3
    prefix = _randn(2, 3, width + 2, seed=1)[..., :width] if width else None
    c = torch.rand(features + width) + 0.5
    _same_quantized(block.gelu_quantize(x, prefix, c), reference.gelu_quantize(x, prefix, c))
    _same_quantized(block.gelu_quantize(x, prefix), reference.gelu_quantize(x, prefix))
    assert block.gelu_quantize(x[:0])[0].shape == (0, features)
    assert_close(block.gelu(x, prefix), reference.gelu(x, prefix), 1e-6)
    assert block.gelu(x[:0]).shape == (0, 3, features)


@inside
@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize(("heads", "features"), [(1, 2), (3, 12), (24, 64), (9, 128)])
def test_qk_norm_rope(poisoned, heads, features, context):
    from tritflow.kernels import reference
    from tritflow.kernels.triton.rope import qk_norm_rope
    from tritflow.testing import assert_close

    batch, tokens = 2, 4
    q, k, _ = _randn(batch, tokens, 3 * heads * features).view(batch, tokens, 3, heads, features).unbind(2)
    angles = _randn(tokens + context, features // 2, seed=3).repeat_interleave(2, dim=1)
    weights = [_randn(features, seed=s) for s in (4, 5, 6, 7)]
    args = [q, k, *weights[:2], angles.cos(), angles.sin()]
    if context:
        cq, ck = _randn(batch, context, 2, heads, features, seed=8).unbind(2)
        args += [cq, ck, *weights[2:]]
    for found, expected in zip(qk_norm_rope(*args), reference.qk_norm_rope(*args), strict=True):
        assert_close(found, expected, 1e-5)


@inside
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 5, 70), (1, 2, 5000)])
def test_gated_residual(poisoned, shape):
    from tritflow.kernels import reference
    from tritflow.kernels.triton import block
    from tritflow.testing import assert_close

    residual, y = _randn(shape[0], shape[1] + 3, shape[2])[:, 2:-1], _randn(*shape, seed=1)
    gate = _randn(shape[0], 2 * shape[2], seed=2)[:, shape[2] :]
    expected = reference.gated_residual(residual, gate, y)
    assert_close(block.gated_residual(residual, gate, y), expected, 1e-6)


@inside
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
def test_product_with_gated_residual(problem, poisoned, kind):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton import backend
    from tritflow.testing import assert_close

    p = problem(12, 40, 200)
    q, scale = reference.quantize_activation(p["x"], None, kind)
    for batch, bias in ((3, None), (3, p["bias"]), (1, None), (1, p["bias"])):
        tokens = 12 // batch
        residual, gate = _randn(batch, tokens + 2, 40)[:, 1 : tokens + 1], _randn(batch, 80, seed=1)[:, 40:]
        args = (q, scale, p["weight"], p["weight_scale"], torch.float32, bias, residual, gate)
        assert_close(backend.w2a8_matmul(*args), reference.w2a8_matmul(*args), 1e-6)


@inside
@pytest.mark.parametrize("shape", [(1, 1), (9, 70), (20, 257), (3, 1300)])
def test_expand(problem, poisoned, shape):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.expand import expand

    p = problem(1, *shape)
    assert torch.equal(expand(p["weight"], shape[1], torch.int8), p["trits"])
    fp8 = expand(p["weight"], shape[1], torch.float8_e4m3fn)
    assert fp8.dtype == torch.float8_e4m3fn
    assert torch.equal(fp8.float(), p["trits"].float())
    dense = reference.dequantize(p["weight"], shape[1], p["weight_scale"])
    assert torch.equal(expand(p["weight"], shape[1], torch.float32, p["weight_scale"]), dense)


@inside
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_scale_sums(problem, poisoned, bias, gated):
    import torch

    from tritflow.kernels import reference
    from tritflow.kernels.triton.block import scale_sums
    from tritflow.testing import assert_close

    p = problem(12, 40, 200)
    q, scale = reference.quantize_activation(p["x"])
    sums = (q.int() @ p["trits"].int().t()).contiguous()
    rest = (p["bias"] if bias else None, *((_randn(3, 4, 40), _randn(3, 40, seed=1)) if gated else (None, None)))
    expected = reference.w2a8_matmul(q, scale, p["weight"], p["weight_scale"], torch.float32, *rest)
    assert_close(scale_sums(sums, scale, p["weight_scale"], torch.float32, *rest), expected, 1e-6)
