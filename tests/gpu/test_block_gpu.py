"""Block kernels, the scratch route and the fused forward as a GPU runs them: ``make test-gpu``."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("triton")

from tritflow.formats.packing import pack_2bit
from tritflow.kernels import (
    adaln,
    adaln_quantize,
    gated_residual,
    gelu,
    gelu_quantize,
    qk_norm_rope,
    quantize_activation,
    reference,
    w2a8_matmul,
    w2a16_linear,
)
from tritflow.models.flux1 import is_modulation
from tritflow.pipelines import synthetic
from tritflow.pipelines.optimize import deoptimize, optimize
from tritflow.testing import assert_close, relative_error, transformer_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 4e-3}
OPS = torch.ops.tritflow
CONFIG = {
    "_class_name": "FluxTransformer2DModel",
    "attention_head_dim": 128,
    "num_attention_heads": 4,
    "axes_dims_rope": [16, 56, 56],
    "num_layers": 2,
    "num_single_layers": 3,
    "joint_attention_dim": 256,
    "pooled_projection_dim": 64,
    "in_channels": 64,
    "guidance_embeds": True,
}


def _kinds():
    fp8 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 9)
    return ["int8", "float8_e4m3fn"] if fp8 else ["int8"]


def _randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _same_quantized(found, expected):
    """Equal but where the two round a mean differently."""
    assert_close(found[1], expected[1], 1e-5)
    q, e = found[0].cpu().float(), expected[0].float()
    if found[0].dtype == torch.int8:
        assert (q - e).abs().max() <= 1
    assert (q != e).float().mean() < 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5, 70), (2, 130, 3072), (1, 0, 64)])
def test_adaln(shape, dtype):
    batch, tokens, features = shape
    x, table = _randn(*shape, dtype=dtype) * 3 + 1, _randn(batch, 3 * features, seed=1, dtype=dtype)
    args = (x, table[:, :features], table[:, 2 * features :])
    on = (x.cuda(), *(t[:, k * features : (k + 1) * features] for k, t in ((0, table.cuda()), (2, table.cuda()))))
    if tokens:
        assert_close(adaln(*on), reference.adaln(*args), DTYPES[dtype])
    c = torch.rand(features) + 0.5
    for kind in _kinds():
        found = adaln_quantize(*on, c.cuda(), kind)
        assert found[0].shape == (batch * tokens, features)
        if tokens:
            _same_quantized(found, reference.adaln_quantize(*args, c, kind))


@pytest.mark.parametrize("index", range(6))
def test_every_setting_of_adaln(index):
    from tritflow.kernels.triton.adaln import TILES
    from tritflow.kernels.triton.adaln import adaln_quantize as run

    for shape in ((2, 131, 3072), (1, 4608, 3072), (1, 7, 1100)):
        x, table = _randn(*shape, dtype=torch.bfloat16) * 3 + 1, _randn(shape[0], 2 * shape[2], dtype=torch.bfloat16)
        for given in (x, x + 300):
            args = (given, *table.chunk(2, dim=1))
            for kind in _kinds():
                found = run(*(a.cuda() for a in args), None, kind, tile=TILES[index])
                _same_quantized(found, reference.adaln_quantize(*args, None, kind))
                again = run(*(a.cuda() for a in args), None, kind, tile=TILES[index])
                assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "width"), [(50, 0), (12288, 3072), (1000, 24)])
def test_gelu_quantize(features, width, dtype):
    x = _randn(2, 33, features + 8, dtype=dtype)[..., 8:] * 3
    prefix = _randn(2, 33, width, seed=1, dtype=dtype) if width else None
    for kind in _kinds():
        found = gelu_quantize(x.cuda(), None if prefix is None else prefix.cuda(), None, kind)
        _same_quantized(found, reference.gelu_quantize(x, prefix, None, kind))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "width"), [(50, 0), (12288, 3072), (1000, 24)])
def test_gelu(features, width, dtype):
    x = _randn(2, 33, features + 8, dtype=dtype)[..., 8:] * 3
    prefix = _randn(2, 33, width, seed=1, dtype=dtype) if width else None
    found = gelu(x.cuda(), None if prefix is None else prefix.cuda())
    assert_close(found, reference.gelu(x, prefix), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("context", [0, 37])
@pytest.mark.parametrize(("heads", "features"), [(24, 128), (3, 64), (9, 20)])
def test_qk_norm_rope(heads, features, context, dtype):
    tokens = 130
    q, k, _ = _randn(2, tokens, 3 * heads * features, dtype=dtype).view(2, tokens, 3, heads, features).unbind(2)
    angles = _randn(tokens + context, features // 2, seed=3).repeat_interleave(2, dim=1)
    weights = [_randn(features, seed=s, dtype=dtype) for s in (4, 5, 6, 7)]
    args = [q, k, *weights[:2], angles.cos(), angles.sin()]
    if context:
        cq, ck = _randn(2, context, 2, heads, features, seed=8, dtype=dtype).unbind(2)
        args += [cq, ck, *weights[2:]]
    found = qk_norm_rope(*(a.cuda() for a in args))
    for f, e in zip(found, reference.qk_norm_rope(*args), strict=True):
        assert_close(f, e, DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_gated_residual(dtype):
    residual, y = _randn(2, 140, 3072, dtype=dtype)[:, 10:], _randn(2, 130, 3072, seed=1, dtype=dtype)
    gate = _randn(2, 6144, seed=2, dtype=dtype)[:, 3072:]
    found = gated_residual(residual.cuda(), gate.cuda(), y.cuda())
    assert_close(found, reference.gated_residual(residual, gate, y), DTYPES[dtype])


def _matmul(tokens, out_features, in_features, kind, gated):
    g = torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (out_features, in_features), generator=g, dtype=torch.int8)
    q, scale = quantize_activation(torch.randn(tokens, in_features, generator=g), None, kind)
    row = (torch.rand(out_features, generator=g) * 0.1).bfloat16()
    bias = torch.randn(out_features, generator=g).bfloat16()
    batch = 2 if tokens % 2 == 0 else 1
    residual = torch.randn(batch, tokens // batch, out_features, generator=g).bfloat16() if gated else None
    gate = torch.randn(batch, out_features, generator=g).bfloat16() if gated else None
    return q, scale, pack_2bit(trits), row, torch.bfloat16, bias, residual, gate


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("backend", ["triton", "scratch", "hopper"])
@pytest.mark.parametrize("shape", [(1, 64, 128), (128, 256, 128), (300, 384, 1040), (512, 512, 3072)])
def test_matmul(shape, backend, gated):
    from tritflow.kernels import BackendError

    for kind in _kinds():
        args = _matmul(*shape, kind, gated)
        on = [a.cuda() if isinstance(a, torch.Tensor) else a for a in args]
        try:
            found = w2a8_matmul(*on, backend=backend)
        except BackendError as error:
            if backend == "triton":  # takes every shape on every GPU
                raise
            pytest.skip(str(error))
        assert_close(found, reference.w2a8_matmul(*args), 4e-3)


def test_decoding_in_assembly_gives_the_same_bits(monkeypatch):
    from tritflow.kernels.triton import gemm

    if not gemm.PACKED_ASM:
        pytest.skip("no assembly on this GPU")
    q, scale, weight, row, _, bias, *_ = _matmul(300, 384, 1040, "int8", False)
    x = q.float() * scale[:, None]
    products = [
        (w2a16_linear, (x.to(dtype).cuda(), weight.cuda(), row.cuda(), bias.cuda()))
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
    ]
    for kind in _kinds():
        rows, scales = quantize_activation(x, None, kind)
        on = [t.cuda() for t in (rows, scales, weight, row)]
        products.append((w2a8_matmul, (*on, torch.float32, bias.cuda())))
    for op, args in products:
        found = op(*args, backend="triton")
        monkeypatch.setattr(gemm, "PACKED_ASM", False)
        assert torch.equal(op(*args, backend="triton"), found)
        monkeypatch.undo()


@pytest.mark.parametrize("shape", [(300, 384, 1040), (33, 130, 200)])
def test_w2a16_scratch(shape):
    q, scale, weight, row, _, bias, *_ = _matmul(*shape, "int8", False)
    x = (q.float() * scale[:, None]).bfloat16()
    c = torch.rand(shape[2]).bfloat16() + 0.5
    for columns in (None, c):
        expected = reference.w2a16_linear(x, weight, row, bias, columns)
        on = [None if a is None else a.cuda() for a in (x, weight, row, bias, columns)]
        assert_close(w2a16_linear(*on, backend="scratch"), expected, 4e-3)


def test_opcheck_on_the_gpu():
    x, vector = _randn(2, 5, 64, dtype=torch.bfloat16).cuda(), _randn(2, 64, dtype=torch.bfloat16).cuda()
    torch.library.opcheck(OPS.adaln.default, (x, vector, vector))
    torch.library.opcheck(OPS.adaln_quantize.default, (x, vector, vector))
    torch.library.opcheck(OPS.gelu_quantize.default, (x, x))
    torch.library.opcheck(OPS.gated_residual.default, (x, vector, x))
    args = [a.cuda() if isinstance(a, torch.Tensor) else a for a in _matmul(64, 128, 256, "int8", True)]
    for backend in ("triton", "scratch"):
        torch.library.opcheck(OPS.w2a8_matmul.default, (*args, backend))


def _inputs(model):
    inputs = transformer_inputs(model, batch=2, height=12, width=12, text_tokens=40, dtype=torch.bfloat16)
    return {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


@torch.no_grad()
@pytest.mark.parametrize("backend", ["triton", "scratch"])
@pytest.mark.parametrize("mode", ["w2a16", "w2a8"])
def test_fused_forward_equals_the_stock_one(mode, backend):
    torch.manual_seed(0)
    kind = _kinds()[-1]
    model = synthetic.random_ternary(CONFIG, mode=mode, activation_dtype=kind, backend=backend)
    inputs = _inputs(model)
    expected = model(**inputs)[0]
    eager = optimize(model, cuda_graph=False)(**inputs)[0]
    assert relative_error(eager, expected) < (1e-2 if mode == "w2a16" else 6e-2)
    optimize(model, cuda_graph=True)
    assert all(linear.weight.device.type == "cpu" for linear in _modulation(model))
    for _ in range(4):
        assert torch.equal(model(**inputs)[0], eager)
    other = {**inputs, "hidden_states": inputs["hidden_states"] * 2}
    assert relative_error(model(**other)[0], eager) > 1e-2
    assert torch.equal(model(**inputs)[0], eager)
    deoptimize(model)
    assert all(linear.weight.device.type == "cuda" for linear in _modulation(model))
    assert torch.equal(model(**inputs)[0], expected)


def _modulation(model):
    return [module for name, module in model.named_modules() if is_modulation(name)]


def _taken(model, **options):
    """Bytes that `optimize` takes on the GPU at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimize(model, device="cuda", **options)
    return torch.cuda.max_memory_allocated() - before


@torch.no_grad()
def test_modulation_never_enters_the_gpu():
    torch.manual_seed(0)
    model = synthetic.random_ternary(CONFIG, "cpu")
    other, twin = copy.deepcopy(model), copy.deepcopy(model).cuda()
    held = sum(t.nbytes for linear in _modulation(model) for t in (*linear.parameters(), *linear.buffers()))
    assert _taken(model) <= _taken(other, offload_modulation=False) - held
    inputs = _inputs(twin)
    assert relative_error(model(**inputs)[0], twin(**inputs)[0]) < 6e-2
