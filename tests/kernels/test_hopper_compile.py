"""The Hopper kernels compile without a GPU, and their machine code keeps what the design rests on."""

import re

import pytest

from tritflow.kernels.hopper import supports, why_not, why_not_compile

reason = why_not_compile()
compiles = pytest.mark.skipif(reason is not None, reason=str(reason))

CASES = [
    ({}, "int8"),
    ({}, "fp8"),
    ({"lag": 0}, "fp8"),
    ({"split": 1}, "int8"),
    ({"split": 1, "block_n": 128, "stages": 8}, "int8"),
    ({"block_m": 64, "stages": 8}, "int8"),
    ({"stages": 4}, "bf16"),
    ({"split": 1, "block_n": 128, "stages": 5}, "bf16"),
]


@compiles
@pytest.mark.parametrize(("config", "dtype"), CASES)
def test_products_are_asynchronous_and_nothing_spills(config, dtype):
    from tritflow.kernels.hopper.aot import compile_w2a8, in_flight_overwrites
    from tritflow.kernels.hopper.launch import Config

    settings = Config(**config)
    compiled = compile_w2a8(settings, activation_dtype=dtype)
    assert compiled.spills == 0
    assert compiled.stack == 0
    assert compiled.notes == ()  # ptxas says there when it serialises wgmma
    assert compiled.shared <= 227 * 1024
    assert in_flight_overwrites(compiled.sass) == []
    # Two consumers, each with (rows / 2 / 64) blocks of rows by K slices of 32 bytes a step.
    opcode = {"int8": "IGMMA", "fp8": "QGMMA", "bf16": "HGMMA"}[dtype]
    assert compiled.count(opcode) == 2 * (settings.block_n // 128) * (8 if dtype == "bf16" else 4)
    if dtype != "bf16":
        assert compiled.count("LDSM") > 0


TILES = [
    ({"consumers": 3, "block_m": 192, "block_n": 192, "stages": 5, "lag": 1}, "int8"),
    ({"consumers": 3, "block_m": 192, "block_n": 192, "stages": 5, "lag": 1}, "fp8"),
    ({"consumers": 4, "block_m": 128, "block_n": 256, "stages": 6, "lag": 1}, "int8"),
    ({"consumers": 3, "block_m": 128, "block_n": 192, "stages": 4, "lag": 1}, "bf16"),
    ({"consumers": 3, "block_m": 64, "block_n": 192, "stages": 7, "lag": 1}, "bf16"),
]


@compiles
@pytest.mark.parametrize(("config", "dtype"), TILES)
def test_tiles_of_many_consumers_fit_registers_and_shared_memory(config, dtype):
    from tritflow.kernels.hopper.aot import compile_consumers, in_flight_overwrites
    from tritflow.kernels.hopper.launch import Config

    settings = Config(**config)
    compiled = compile_consumers(settings, activation_dtype=dtype)
    assert (compiled.spills, compiled.stack, compiled.notes) == (0, 0, ())
    assert compiled.shared <= 227 * 1024
    assert in_flight_overwrites(compiled.sass) == []
    opcode = {"int8": "IGMMA", "fp8": "QGMMA", "bf16": "HGMMA"}[dtype]
    products = settings.consumers * (2 if settings.block_m == 192 else 1)
    assert compiled.count(opcode) == products * (8 if dtype == "bf16" else 4)


@compiles
@pytest.mark.parametrize(("config", "dtype"), CASES)
def test_a_low_rank_update_is_one_more_product_of_16_bits(config, dtype):
    from tritflow.kernels.hopper.aot import compile_w2a8, in_flight_overwrites
    from tritflow.kernels.hopper.launch import Config

    settings = Config(**config)
    plain = compile_w2a8(settings, activation_dtype=dtype)
    compiled = compile_w2a8(settings, activation_dtype=dtype, has_low=True)
    assert (compiled.spills, compiled.stack, compiled.notes) == (0, 0, ())
    assert compiled.shared <= plain.shared + 64  # factors lie in the ring's own memory
    assert in_flight_overwrites(compiled.sass) == []
    assert compiled.count("HGMMA") - plain.count("HGMMA") == 2 * (settings.block_n // 128)


SKINNY_TYPES = {"x": "*bf16", "weight": "*u8", "weight_scale": "*bf16", "bias": "*bf16", "out": "*bf16", "N": "i32"}


def lines_with(compiled, word):
    return [i for i, line in enumerate(compiled.sass.splitlines()) if word in line]


@compiles
@pytest.mark.parametrize(("parts", "chunk", "early"), [(1, 256, False), (4, 64, False), (4, 64, True)])
def test_the_skinny_kernel_moves_16_bytes_at_a_time(parts, chunk, early):
    from tritflow.kernels.hopper.aot import compile_gluon
    from tritflow.kernels.hopper.skinny import w2a16_skinny_kernel

    constants = {"K": 3072, "BYTES": 768, "CHUNK": chunk, "PARTS": parts, "ROWS": 16, "HAS_BIAS": True}
    constants |= {"EARLY": early, "PREFETCH": early}
    compiled = compile_gluon(w2a16_skinny_kernel, SKINNY_TYPES | {"M": "i32"}, constants, num_warps=parts)
    assert compiled.spills == 0
    assert compiled.shared <= 4096  # the sums of the warps
    assert compiled.count("LDG.E.EF.128") == 24 // parts  # 16 rows x 768 bytes in 16-byte pieces a lane
    assert compiled.count("LDG.E.128") == 96 // parts  # and the activations of 8 rows, in eighths of a lane
    waits, fetches, loads = (lines_with(compiled, word) for word in ("ACQBULK", "UBLKPF", "LDG"))
    assert (len(waits), len(fetches)) == (early, early)
    assert all(fetch < wait < min(loads) for fetch, wait in zip(fetches, waits, strict=True))


@compiles
@pytest.mark.parametrize(("rows", "early"), [(16, False), (16, True), (32, False), (48, False)])
def test_one_row_asks_for_all_it_reads_first_and_for_the_row_before_the_weights(rows, early):
    from tritflow.kernels.hopper.aot import compile_gluon
    from tritflow.kernels.hopper.one_row import one_row_kernel

    parts = 4
    constants = {"K": 3072, "BYTES": 768, "PARTS": parts, "ROWS": rows, "WHOLE": True, "HAS_BIAS": True}
    constants |= {"EARLY": early}
    compiled = compile_gluon(one_row_kernel, SKINNY_TYPES, constants, num_warps=parts)
    assert compiled.spills == 0
    assert compiled.registers <= {16: 102, 32: 168, 48: 255}[rows]  # so that all blocks fit at once
    weights, activations = lines_with(compiled, "LDG.E.EF.128"), lines_with(compiled, "LDG.E.128")
    assert len(weights) == 24 // parts * (rows // 16)
    assert len(activations) == 12 // parts  # a warp reads its part of the row once
    assert max(activations) < min(weights)
    assert max(weights) < min(lines_with(compiled, "BAR.SYNC"))
    fields = 4 * (24 // parts // 2) * 2 // 4  # products a field: two of 16 rows for each 64 bytes
    assert compiled.count("IMMA") == fields * (4 * rows // 16 + 3)
    waits = lines_with(compiled, "ACQBULK")
    assert len(waits) == early
    assert all(wait < min(lines_with(compiled, "LDG")) for wait in waits)


@compiles
@pytest.mark.parametrize("read", [True, False])
def test_the_limit_reads_what_the_product_reads(read):
    from tritflow.kernels.hopper.aot import compile_gluon
    from tritflow.kernels.hopper.limits import read_kernel

    constants = {"BYTES": 768, "PARTS": 4, "ROWS": 16, "WHOLE": True, "READ": read}
    types = {"weight": "*u8", "out": "*i32", "N": "i32"}
    compiled = compile_gluon(read_kernel, types, constants, num_warps=4)
    assert compiled.count("LDG.E.EF.128") == 6 * read
    assert compiled.count("LDG") == 6 * read
    assert compiled.shared == 0


@compiles
def test_every_unit_has_its_own_number_of_steps():
    # Triton 3.6 replaced a bound that was carried from unit to unit by the first unit's.
    from tritflow.kernels.hopper.aot import compile_w2a8
    from tritflow.kernels.hopper.launch import Config

    _, *loops = compile_w2a8(Config()).asm["ttgir"].split("scf.for ")
    assert len(loops) == 6  # over units, and over steps within: two consumers and the copying warp
    for units, steps in zip(loops[::2], loops[1::2], strict=True):
        bound = re.match(r"%\S+ = %\S+ to (%\S+) step", steps)
        assert bound is not None
        assert f"{bound[1]} = " in units


@compiles
def test_the_guard_sees_an_overwritten_register():
    from tritflow.kernels.hopper.aot import in_flight_overwrites

    product = "IGMMA.64x128x32.S8.S8 R24, R160, gdesc[UR12], R24, gsb0 ;"
    wait = "WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
    decode = "LOP3.LUT R162, R4, 0xc0c0c0c0, RZ, 0xc0, !PT ;"
    assert in_flight_overwrites("\n".join([product, wait, decode])) == []
    assert in_flight_overwrites("\n".join([product, decode, wait])) == [decode]
    assert in_flight_overwrites("\n".join([product, "LDSM.16.M88.4 R160, [R2] ;", wait]))
    assert in_flight_overwrites("\n".join([product, "@!P0 LDSM.16.M88.4 R160, [R2] ;", wait]))
    assert in_flight_overwrites("\n".join([product, "@P0 BRA 0x100 ;", wait]))
    assert in_flight_overwrites("\n".join([product, decode.replace("R162", "R164"), wait])) == []


@compiles
def test_configurations_that_cannot_run_are_refused():
    from tritflow.kernels.hopper.launch import Config

    with pytest.raises(ValueError, match="no such tile"):
        Config(block_m=96)
    with pytest.raises(ValueError, match="lag must be below"):
        Config(lag=6)
    with pytest.raises(ValueError, match="no such tile"):
        Config(consumers=3, block_m=192, block_n=256)
    with pytest.raises(ValueError, match="would never drain"):
        Config(consumers=3, block_m=192, block_n=192, stages=4, lag=2)
    with pytest.raises(ValueError, match="split=1"):
        Config(block_n=128, split=2)


def test_sizes_the_copy_engine_takes():
    assert supports(1, 128, 128)
    assert supports(77, 264, 144)
    assert not supports(0, 128, 128)
    assert not supports(1, 100, 128)
    assert not supports(1, 128, 100)


def test_without_a_gpu_it_says_why():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert why_not() == "no CUDA device"


class _NoGpu:
    """As much of Triton's driver as compiling for an absent GPU takes."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_device_interface(self):
        raise AssertionError("nothing may run here")


@compiles
@pytest.mark.parametrize(("shape", "rows"), [((37, 264, 144), 128), ((4608, 9216, 3072), 256)])
@pytest.mark.parametrize("fp8", [False, True])
def test_the_host_side_hands_over_what_the_kernel_takes(monkeypatch, shape, rows, fp8):
    import types

    import torch
    import triton.runtime.driver

    from tritflow.kernels.hopper import launch

    compiled = []

    class Recorder:
        def __getitem__(self, grid):
            def start(*arguments, **options):
                compiled.append((grid, options, launch_kernel.warmup(*arguments, grid=grid, **options)))

            return start

    launch_kernel = launch.w2a8_kernel
    launch._tables.cache_clear()
    launch._multiprocessors.cache_clear()
    monkeypatch.setattr(triton.runtime.driver, "_active", _NoGpu())
    monkeypatch.setattr(launch, "w2a8_kernel", Recorder())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(multi_processor_count=132))
    m, n, k = shape
    q = torch.zeros(m, k, dtype=torch.float8_e4m3fn if fp8 else torch.int8)
    weight = torch.zeros(n, 32 * -(-k // 128), dtype=torch.uint8)
    out = launch.w2a8_gemm(q, torch.ones(m), weight, torch.ones(n, dtype=torch.bfloat16), torch.ones(n))
    groups = 3 if n % 768 == 0 else 1
    factors = (torch.ones(m, groups * 32, dtype=torch.bfloat16), torch.ones(n, 32, dtype=torch.bfloat16))
    launch.w2a8_gemm(q, torch.ones(m), weight, torch.ones(n, dtype=torch.bfloat16), torch.ones(n), *factors)
    launch._tables.cache_clear()
    launch._multiprocessors.cache_clear()
    assert out.shape == (m, n)
    (grid, options, kernel), (_, with_low, low_kernel) = compiled
    assert (options["HAS_LOW"], with_low["HAS_LOW"]) == (False, True)
    assert low_kernel.metadata.shared <= 227 * 1024
    assert options["SPLIT"] == rows // 128  # narrow where wide tiles would leave most of the GPU without work
    assert 0 < grid[0] <= 132
    assert kernel.metadata.num_warps == 12
    assert kernel.metadata.shared <= 227 * 1024
