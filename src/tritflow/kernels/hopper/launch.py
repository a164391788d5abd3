"""Host side of the W2A8 product: shapes to schedule, schedule to device tables, tensors to a launch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tritflow.kernels import tuning
from tritflow.kernels.hopper.consumers import consumers_kernel
from tritflow.kernels.hopper.gemm import w2a8_kernel
from tritflow.kernels.hopper.schedule import NARROW, Schedule, make_schedule
from tritflow.kernels.low_rank_op import RANK_UNIT

_DTYPES = {
    torch.int8: gl.int8,
    torch.float8_e4m3fn: gl.float8e4nv,
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
}


@dataclass(frozen=True)
class Config:
    """One way to run the product; every choice gives the same bits for int8.

    ``block_m`` tokens by ``block_n`` weight rows a tile; ``stages`` of 128 K in shared memory; ``split`` 2 decodes
    one half of a consumer's rows while the other half is multiplied; ``lag`` steps between the consumers at the
    start; ``group`` token tiles share a band; ``persistent`` keeps one block a multiprocessor.

    With ``consumers`` (2, 3 or 4) it is `hopper.consumers` that runs: tiles of 64, 128 or 192 tokens by 64 weight rows
    a consumer; ``split`` and ``persistent`` mean nothing there.
    """

    block_m: int = 128
    block_n: int = 256
    stages: int = 6
    split: int = 2
    lag: int = 3
    group: int = 8
    persistent: bool = True
    consumers: int = 0

    def __post_init__(self) -> None:
        if self.consumers:
            if (
                self.consumers not in (2, 3, 4)
                or self.block_m not in (64, 128, 192)
                or self.block_n != 64 * self.consumers
            ):
                raise ValueError(f"no such tile: {self.block_m}x{self.block_n} with {self.consumers} consumers")
            if not 0 <= self.lag * (self.consumers - 1) < self.stages:
                raise ValueError(f"lag={self.lag} is too long for stages={self.stages}: the ring would never drain")
            return
        if self.block_m not in (64, 128) or self.block_n not in (128, 256) or self.split not in (1, 2):
            raise ValueError(f"no such tile: block_m={self.block_m}, block_n={self.block_n}, split={self.split}")
        if self.block_n // 2 // self.split < 64:
            raise ValueError("a consumer's weight rows cannot be cut below 64: use split=1 with block_n=128")
        if not 0 <= self.lag < self.stages:
            raise ValueError(f"lag must be below stages={self.stages}, got {self.lag}: the ring would never drain")

    @property
    def name(self) -> str:
        if self.consumers:
            return f"{self.block_m}x{self.block_n}x{self.stages} c{self.consumers} l{self.lag} g{self.group}"
        text = f"{self.block_m}x{self.block_n}x{self.stages} s{self.split} l{self.lag} g{self.group}"
        return text + ("" if self.persistent else " one-tile")

    def to_dict(self) -> dict[str, int | bool]:
        return asdict(self)


@lru_cache(maxsize=64)
def _swizzled(rows: int, columns: int, dtype: object) -> gl.NVMMASharedLayout:
    return gl.NVMMASharedLayout.get_default_for([rows, columns], dtype)


def _descriptor(matrix: torch.Tensor, block: list[int], dtype: object) -> TensorDescriptor:
    """Of a matrix with contiguous rows, for the copy engine."""
    rows, columns = matrix.shape
    stride = matrix.stride(0) if rows > 1 else columns  # of a single row PyTorch's may be anything
    return TensorDescriptor(matrix, [rows, columns], [stride, 1], block, _swizzled(*block, dtype))


@lru_cache(maxsize=16)
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=256)
def _tables(
    m: int, n: int, k: int, config: Config, device: torch.device
) -> tuple[Schedule, torch.Tensor, torch.Tensor]:
    blocks = _multiprocessors(device)
    if not config.persistent:
        blocks = -(-m // config.block_m) * -(-n // config.block_n)
    schedule = make_schedule(
        m,
        n,
        k,
        block_m=config.block_m,
        block_n=config.block_n,
        blocks=blocks,
        group=config.group,
    )
    units = torch.tensor(schedule.units, dtype=torch.int32).to(device)
    return schedule, units, torch.tensor(schedule.starts, dtype=torch.int32).to(device)


def choose(m: int, n: int, k: int, dtype: torch.dtype, device: torch.device) -> Config:
    """The configuration used where none is given: the one tuned for GPU and size, or that of the shortest schedule."""
    name = tuning.W2A16 if dtype.itemsize == 2 else tuning.w2a8(dtype)
    choice = tuning.lookup(device, name, m, n, k)
    if choice is not None and choice.backend == "hopper":
        return Config(**choice.config)
    return shortest(m, n, k, 8 * dtype.itemsize, _multiprocessors(device))


@lru_cache(maxsize=1024)
def shortest(m: int, n: int, k: int, bits: int, blocks: int) -> Config:
    """Whichever of the wide and the narrow tiles has the shorter schedule, by a rule that measures nothing."""
    wide = Config(stages=4, lag=1) if bits == 16 else Config()
    narrow = Config(split=1, block_n=128, stages=5 if bits == 16 else 8, lag=1 if bits == 16 else 2, group=4)

    def cost(config: Config) -> float:
        size = {"block_m": config.block_m, "block_n": config.block_n, "blocks": blocks}
        schedule = make_schedule(m, n, k, **size, group=config.group)
        return schedule.critical_steps() * config.block_n * (NARROW if config is narrow else 1)

    return min((narrow, wide), key=cost)


def w2a8_gemm(
    q: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """out[m, n] = q[m, :] @ T[n, :] * x_scale[m] * weight_scale[n] (+ bias[n]) (+ low[m, :] @ up[n, :]), in bf16.

    q [M, K] int8 or float8_e4m3fn, x_scale fp32 [M], weight uint8 [N, 32 * ceil(K / 128)] (``formats.packing``),
    weight_scale and bias [N] of any float type. int8 sums are exact; e4m3 sums are those of the tensor cores' own
    accumulation. ``low`` and ``up`` are bf16 and come as ``w2a8_matmul`` takes them, with R a multiple of 16 and no
    tile across two layers' rows. Raises ValueError for tensors that do not fit together.
    """
    if q.dtype not in (torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"activations must be int8 or float8_e4m3fn, got {q.dtype}")
    return _gemm(q, x_scale.contiguous(), weight, weight_scale, bias, out, config, low, up)


def w2a16_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
    *,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """out[m, n] = x[m, :] @ T[n, :] * weight_scale[n] (+ bias[n]) (+ low[m, :] @ up[n, :]), in x's type.

    x [M, K] bfloat16 or float16, low and up of that type, the rest as for ``w2a8_gemm``; float32 sums. Raises
    ValueError for tensors that do not fit together.
    """
    if x.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"activations must be bfloat16 or float16, got {x.dtype}")
    return _gemm(x, weight_scale, weight, weight_scale, bias, out, config, low, up)


def _aligned_rows(t: torch.Tensor) -> torch.Tensor:
    """`_aligned`, but that rows may lie apart, by multiples of 16 bytes."""
    apart = t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
    return t if apart else _aligned(t)


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """Contiguous and beginning at a multiple of 16 bytes, as the copy engine wants it."""
    t = t.contiguous()
    return t if t.data_ptr() % 16 == 0 else t.clone()


def _gemm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor | None,
    config: Config | None,
    low: torch.Tensor | None = None,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    (m, k), n = x.shape, weight.shape[0]
    bits = 8 * x.itemsize
    if weight.shape[1] != 32 * -(-k // 128):
        raise ValueError(f"packed rows of {weight.shape[1]} bytes do not hold K={k}: {32 * -(-k // 128)} expected")
    if n % 8 or k * bits % 128:
        raise ValueError(f"the Hopper kernel takes N divisible by 8 and K by {128 // bits}, got N={n}, K={k}")
    out = torch.empty((m, n), dtype=torch.bfloat16 if bits == 8 else x.dtype, device=x.device) if out is None else out
    if m == 0:
        return out
    x, weight, weight_scale = _aligned(x), _aligned(weight), weight_scale.contiguous()
    config = config or choose(m, n, k, x.dtype, x.device)
    if config.consumers:
        if low is None:
            _launch_consumers(x, x_scale, weight, weight_scale, bias, out, config)
            return out
        config = shortest(m, n, k, bits, _multiprocessors(x.device))  # that kernel adds no low-rank update
    schedule, table, starts = _tables(m, n, k, config, x.device)
    bm, bn = config.block_m, config.block_n

    dtype, out_dtype = _DTYPES[x.dtype], _DTYPES[out.dtype]
    x_desc, w_desc = _descriptor(x, [bm, 128], dtype), _descriptor(weight, [bn, 32], gl.uint8)
    low_desc, up_desc, steps, rows = x_desc, w_desc, 0, 0
    if low is not None and up is not None:
        steps, rows = up.shape[1] // RANK_UNIT, n * up.shape[1] // low.shape[1]
        if rows != n and rows % bn:
            raise ValueError(f"a tile of {bn} weight rows lies in two layers of {rows} rows: join them otherwise")
        low_desc, up_desc = (
            _descriptor(_aligned_rows(low), [bm, 16], out_dtype),
            _descriptor(_aligned(up), [bn, 16], out_dtype),
        )
    w2a8_kernel[(schedule.grid,)](
        x_desc,
        w_desc,
        _descriptor(out, [bm, bn // 2], out_dtype),
        low_desc,
        up_desc,
        x_scale,
        weight_scale,
        weight_scale if bias is None else bias.contiguous(),
        table,
        starts,
        m,
        n,
        steps,
        rows,
        STAGES=config.stages,
        SPLIT=config.split,
        LAG=config.lag,
        HAS_BIAS=bias is not None,
        HAS_LOW=steps > 0,
        num_warps=4,
    )
    return out


def _launch_consumers(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config,
) -> None:
    (m, n), k = out.shape, x.shape[1]
    dtype, out_dtype = _DTYPES[x.dtype], _DTYPES[out.dtype]
    tiles, first = -(-m // config.block_m) * -(-n // config.block_n), min(config.block_m, 128)
    consumers_kernel[(min(tiles, _multiprocessors(x.device)),)](
        _descriptor(x, [first, 128], dtype),
        _descriptor(x, [64, 128], dtype),
        _descriptor(weight, [64, 32], gl.uint8),
        _descriptor(out, [first, 64], out_dtype),
        _descriptor(out, [64, 64], out_dtype),
        x_scale,
        weight_scale,
        weight_scale if bias is None else bias.contiguous(),
        m,
        n,
        -(-k // 128),
        BM=config.block_m,
        STAGES=config.stages,
        CONSUMERS=config.consumers,
        GROUP=config.group,
        LAG=config.lag,
        HAS_BIAS=bias is not None,
        num_warps=4,
    )
