"""The Hopper kernels against float64 on a Hopper GPU: ``make test-gpu``."""

import pytest
import torch

from tritflow.formats.packing import pack_2bit
from tritflow.kernels.hopper import why_not

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]

SHAPES = [
    (1, 128, 128),
    (37, 264, 144),
    (128, 256, 128),
    (300, 384, 1040),
    (512, 3072, 12288),
    (512, 12288, 3072),
    (4608, 3072, 3072),
]


def _inputs(m, n, k, dtype=torch.int8, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, device="cuda", generator=generator)
    scale = x.abs().amax(1) / (127.0 if dtype == torch.int8 else 448.0)
    q = x / scale[:, None]
    q = (q.round() if dtype == torch.int8 else q).to(dtype)
    trits = torch.randint(-1, 2, (n, k), device="cuda", generator=generator).to(torch.int8)
    row = torch.rand(n, device="cuda", generator=generator).to(torch.bfloat16)
    bias = torch.randn(n, device="cuda", generator=generator).to(torch.bfloat16)
    return q, scale, trits, row, bias


def _expected(q, scale, trits, row, bias):
    y = ((q.double() @ trits.double().T).float() * scale[:, None]).double() * row.double()
    return y if bias is None else y + bias.double()


NARROW = {"split": 1, "block_n": 128, "stages": 8, "lag": 2}
SQUARE = {"consumers": 3, "block_m": 192, "block_n": 192, "stages": 5, "lag": 1}
TILES = [
    SQUARE,
    {"consumers": 3, "block_m": 128, "block_n": 192, "stages": 7, "lag": 0},
    {"consumers": 4, "block_m": 128, "block_n": 256, "stages": 6, "lag": 1},
    {"consumers": 2, "block_m": 192, "block_n": 128, "stages": 6, "lag": 1},
    {"consumers": 3, "block_m": 64, "block_n": 192, "stages": 8, "lag": 1},
]


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"split": 1},
        {"lag": 0},
        {"persistent": False, "stages": 4, "lag": 0},
        NARROW,
        {"split": 1, "block_m": 64},
        *TILES,
    ],
)
def test_int8_is_exact(config):
    from tritflow.kernels.hopper.launch import Config, w2a8_gemm

    for shape in SHAPES:
        q, scale, trits, row, bias = _inputs(*shape)
        for b in (None, bias):
            out = torch.full((shape[0], shape[1]), float("nan"), dtype=torch.bfloat16, device="cuda")
            w2a8_gemm(q, scale, pack_2bit(trits), row, b, out=out, config=Config(**config))
            assert torch.equal(out, _expected(q, scale, trits, row, b).float().to(torch.bfloat16)), shape


def test_random_shapes_are_exact():
    from tritflow.kernels.hopper.launch import w2a8_gemm

    picks = torch.Generator().manual_seed(1)
    for seed in range(1000):
        m, n, k = (
            int(torch.randint(1, top, (), generator=picks)) * unit for top, unit in ((600, 1), (80, 8), (60, 16))
        )
        q, scale, trits, row, bias = _inputs(m, n, k, seed=seed)
        out = w2a8_gemm(q, scale, pack_2bit(trits), row, bias)
        assert torch.equal(out, _expected(q, scale, trits, row, bias).float().to(torch.bfloat16)), (m, n, k)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(4608, 3072, 3072), (512, 3072, 12288)])
@pytest.mark.parametrize("config", [None, SQUARE])
def test_a_thousand_launches_give_the_same_bits(shape, dtype, config):
    from tritflow.kernels.hopper.launch import Config, w2a8_gemm

    q, scale, trits, row, bias = _inputs(*shape, dtype=dtype)
    packed, config = pack_2bit(trits), None if config is None else Config(**config)
    first = w2a8_gemm(q, scale, packed, row, bias, config=config)
    out = torch.empty_like(first)
    for _ in range(1000):
        out.fill_(float("nan"))
        w2a8_gemm(q, scale, packed, row, bias, out=out, config=config)
        assert torch.equal(out, first)


@pytest.mark.parametrize("config", [{}, {"split": 1}, NARROW, *TILES])
def test_fp8_is_near_the_dense_product(config):
    from tritflow.kernels.hopper.launch import Config, w2a8_gemm

    for shape in SHAPES:
        q, scale, trits, row, _ = _inputs(*shape, dtype=torch.float8_e4m3fn)
        expected = _expected(q, scale, trits, row, None)
        out = w2a8_gemm(q, scale, pack_2bit(trits), row, config=Config(**config))
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 3e-3, shape
        if shape[1] % 16 == 0:  # the library takes no other
            dense = torch._scaled_mm(
                q,
                trits.to(torch.float8_e4m3fn).T,
                scale[:, None],
                row.float()[None],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            assert error <= 1.5 * (dense.double() - expected).norm() / expected.norm(), shape


@pytest.mark.parametrize("config", [{}, {"split": 1}, NARROW | {"stages": 5}, TILES[1] | {"stages": 4}])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations(config, dtype):
    from tritflow.kernels.hopper.launch import Config, w2a16_gemm

    for m, n, k in SHAPES:
        _, _, trits, row, bias = _inputs(m, n, k)
        x = torch.randn(m, k, device="cuda").to(dtype)
        expected = (x.double() @ trits.double().T) * row.double() + bias.double()
        out = torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
        w2a16_gemm(x, pack_2bit(trits), row, bias, out=out, config=Config(**{"stages": 4, "lag": 1} | config))
        # One rounding to 8 or 11 bits, whose relative error is 2^-9 or 2^-12 at most.
        error = (out.double() - expected).norm() / expected.norm()
        assert error < (2e-3 if dtype == torch.bfloat16 else 3e-4), (m, n, k)


@pytest.mark.parametrize("shape", [(1, 128, 128), (1, 200, 1280), (3, 200, 272), (8, 3072, 3072), (1, 18432, 3072)])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        *({"rows": 16, "parts": p, "chunk": c} for p, c in ((1, 256), (2, 128), (4, 64), (8, 64))),
        {"rows": 16, "registers": 56, "early": True},
        {"rows": 16, "registers": 56, "early": True, "prefetch": True},
        {"rows": 32, "registers": 96, "early": True, "prefetch": True},
        *({"rows": r, "parts": p, "digits": True} for r, p in ((16, 4), (32, 4), (16, 2), (48, 2))),
        {"rows": 16, "digits": True, "early": True},
        {"digits": True},
    ],
)
def test_skinny(shape, settings):
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    m, n, k = shape
    _, _, trits, row, bias = _inputs(m, n, k)
    x = torch.randn(m, k, device="cuda").to(torch.bfloat16)
    expected = (x.double() @ trits.double().T) * row.double() + bias.double()
    out = w2a16_skinny(x, pack_2bit(trits), row, bias, **settings)
    assert (out.double() - expected).norm() / expected.norm() < 0.003


def test_rows_that_are_placed_early_wait_for_what_they_read():
    """Products whose input, and whose weights, the kernel before has just written, in a graph and not."""
    from tritflow.kernels.hopper.skinny import w2a16_skinny

    n = k = 3072
    _, _, trits, row, _ = _inputs(1, n, k)
    kept, row = [pack_2bit(trits), pack_2bit(-trits)], (row * 0.02)
    weight, x = torch.zeros_like(kept[0]), torch.randn(1, k, device="cuda").bfloat16()
    settings = {"rows": 16, "registers": 56, "early": True, "prefetch": True}

    def chain(**options):
        y, outs = x, []
        for i in range(12):
            weight.copy_(kept[i % 2])
            y = w2a16_skinny(y, weight, row, **options)
            y = w2a16_skinny(y * 1.5, weight, row, **options)
            outs.append(y)
        return torch.cat(outs)

    for plain, early in (
        ({"rows": 16, "registers": 56}, settings),
        ({"rows": 16, "digits": True}, {"rows": 16, "digits": True, "early": True}),
    ):
        expected = chain(**plain)
        for _ in range(50):
            assert torch.equal(chain(**early), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = chain(**early)
        for _ in range(50):
            out.fill_(float("nan"))
            graph.replay()
            assert torch.equal(out, expected)


def test_a_graph_replays_a_product():
    from tritflow.kernels.hopper.launch import w2a8_gemm

    q, scale, trits, row, bias = _inputs(512, 3072, 12288)
    packed = pack_2bit(trits)
    expected = w2a8_gemm(q, scale, packed, row, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = w2a8_gemm(q, scale, packed, row, bias)
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)
