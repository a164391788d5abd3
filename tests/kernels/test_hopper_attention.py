"""The Hopper attention kernel compiles without a GPU, and its machine code keeps what the design rests on."""

import pytest

from tritflow.kernels.hopper import why_not_compile

reason = why_not_compile()
compiles = pytest.mark.skipif(reason is not None, reason=str(reason))

CONFIGS = [
    {},
    {"half": True},
    {"half": True, "ahead": False, "skip": True},
    {"half": True, "consumers": 3, "keys": 64, "ahead": False, "skip": True},
]


def _check(compiled):
    assert compiled.spills == 0
    assert compiled.stack == 0
    assert not [note for note in compiled.notes if "serialized" in note]
    assert compiled.shared <= 227 * 1024


@compiles
@pytest.mark.parametrize("kind", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize("config", CONFIGS)
def test_products_are_asynchronous_and_nothing_spills(config, kind):
    from tritflow.kernels.hopper.aot import compile_attention, in_flight_overwrites
    from tritflow.kernels.hopper.attention_launch import AttentionConfig

    compiled = compile_attention(AttentionConfig(**config), dtype=kind)
    _check(compiled)
    # Products in flight read weights from registers.
    assert in_flight_overwrites(compiled.sass) == []
    settings = AttentionConfig(**config)
    # A product is four slices of 32 of what is summed, two for weights of 64 keys. Queries with keys before the loop,
    # twice in it and, for an even number of tiles, once behind it; weights with values as often.
    logits, values = settings.consumers * 4 * 4, settings.consumers * settings.keys // 32 * 4
    if kind == "int8":
        assert (compiled.count("IGMMA"), compiled.count("QGMMA")) == (logits, values)
    else:
        assert compiled.count("QGMMA") == logits + values


@compiles
@pytest.mark.parametrize("tokens", [1, 129, 300])
def test_any_number_of_tokens_compiles(tokens):
    from tritflow.kernels.hopper.aot import compile_attention
    from tritflow.kernels.hopper.attention_launch import AttentionConfig

    _check(compile_attention(AttentionConfig(), tokens=tokens, features=64, x_dtype="fp32"))


def _half(x):
    """One rounding to fp16, of numbers exact in float64."""
    import torch

    return x.to(torch.float16).double()


def _half_weights(q, k, tile=128):
    """What `weigh_half` computes for e4m3 queries [Q, D] and keys [K, D], step by step: weights, sums, worst code.

    Scales are one a query, as in the kernel, and one for 128 keys; exponents of values are left out.
    """
    import math

    import torch

    factor = q.shape[1] ** -0.5 * math.log2(math.e)
    q_scale = q.abs().amax(1, keepdim=True)  # queries reach 1
    q8 = (q / q_scale).to(torch.float8_e4m3fn).double()
    m = torch.full((q.shape[0], 1), -math.inf, dtype=torch.float64)
    weights, sums, worst = [], torch.zeros_like(m), 0.0
    for first in range(0, k.shape[0], tile):
        keys = k[first : first + tile]
        k_scale = keys.abs().max() / 448
        scale = (q_scale * factor * k_scale).float().double()
        h = _half(q8 @ (keys / k_scale).to(torch.float8_e4m3fn).double().T)
        assert h.isfinite().all()
        new = torch.maximum(m, (h.amax(1, keepdim=True) * scale).ceil())
        alpha = torch.exp2(m - new)
        code = _half(h * _half(scale * 8) + _half(1144 - 8 * new)).clamp_min(1024) - 1024
        worst = max(worst, code.max().item())
        p = code.to(torch.uint8).view(torch.float8_e4m3fn).double()
        partial = p.view(*p.shape[:1], tile // 16, 2, 4, 2).permute(0, 3, 4, 1, 2).flatten(3)  # a thread's, in pairs
        total = torch.zeros(partial.shape[:3], dtype=torch.float64)
        for i in range(partial.shape[3]):
            total = _half(total + partial[..., i])
        weights = [w * alpha for w in weights] + [p]
        sums = sums * alpha + total.sum((1, 2))[:, None]
        m = new
    return torch.cat(weights, 1), sums, worst


@pytest.mark.parametrize("gain", [1e-3, 1.0, 4.0, 12.0])
def test_weights_in_packed_halves_err_little_more_than_exp2_in_e4m3(gain):
    import torch

    from tritflow.kernels.attention_reference import attention
    from tritflow.testing import relative_error

    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(512, 128, generator=g, dtype=torch.float64) for _ in range(2))
    q *= gain
    v = torch.randint(-8, 9, k.shape, generator=g).double()  # exact in e4m3, so that only weights are compared
    weights, sums, worst = _half_weights(q, k)
    assert worst <= 126  # 127 is NaN
    assert relative_error(weights.sum(1, keepdim=True), sums) < 1e-3
    expected = torch.softmax(q @ k.T * 128**-0.5, -1) @ v
    others = attention(*(t.float()[None, :, None] for t in (q, k, v)), "float8_e4m3fn")[0, :, 0]
    assert relative_error(weights @ v / sums, expected) < 1.25 * relative_error(others, expected) + 1e-3


def test_no_product_of_8_bit_queries_and_keys_passes_fp16():
    import torch

    if reason is not None:
        pytest.skip(str(reason))
    from tritflow.kernels.hopper.attention_launch import AttentionConfig, query_max
    from tritflow.kernels.reference import QMAX

    half = AttentionConfig(half=True)
    most = torch.finfo(torch.float16).max
    assert query_max("float8_e4m3fn", half) * QMAX["float8_e4m3fn"] * 128 < most
    assert query_max("float8_e4m3fn", AttentionConfig()) == QMAX["float8_e4m3fn"]
    assert query_max("int8", half) == QMAX["int8"]  # whose sums are read as float32
    with pytest.raises(ValueError, match="skip=True needs ahead=False"):
        AttentionConfig(skip=True)
