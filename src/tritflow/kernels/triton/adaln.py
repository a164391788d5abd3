"""Layer norm, modulation and quantization in one pass over the tokens: see `block_ops.adaln_quantize`.

What bounds it is instructions issued: 9 kB a token leave time for some twenty of them a feature. So features are held
as pieces of one width, that no lane is spent on padding (3072 is three times 1024); rounding to int8 is one
multiply-add, whose low byte is the integer; and a program that takes several tokens reads the modulation once and has
the next token on its way while it reduces this one.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tritflow.kernels import tuning
from tritflow.kernels.reference import AMAX_FLOOR, QMAX, QTYPE
from tritflow.kernels.triton.block import contiguous_features
from tritflow.kernels.triton.quantize import magnitude, rounded, scale_of


@triton.jit
def _load(at, K: tl.constexpr, WIDTH: tl.constexpr):
    """at[0:K] as a tuple of pieces, zeros behind the end; Triton joins tuples, and unpacks none."""
    k = tl.arange(0, WIDTH)
    pieces = ()
    for i in tl.static_range(0, K, WIDTH):
        if i + WIDTH <= K:
            pieces = pieces + (tl.load(at + i + k),)  # type: ignore[assignment]  # noqa: RUF005
        else:
            pieces = pieces + (tl.load(at + i + k, mask=i + k < K, other=0),)  # type: ignore[assignment]  # noqa: RUF005
    return pieces


@triton.jit
def _modulation(scale_ptr, shift_ptr, input_scale_ptr, HAS_COLUMNS: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr):
    """Pieces of what a normed feature is multiplied with, and of what is added then; float32."""
    scales = _load(scale_ptr, K, WIDTH)
    shifts = _load(shift_ptr, K, WIDTH)
    gains = ()
    offsets = ()
    if HAS_COLUMNS:
        columns = _load(input_scale_ptr, K, WIDTH)
    for i in tl.static_range(len(scales)):
        gain = 1.0 + scales[i].to(tl.float32)
        offset = shifts[i].to(tl.float32)
        if HAS_COLUMNS:
            column = columns[i].to(tl.float32)
            gain, offset = gain * column, offset * column
        gains = gains + (gain,)  # type: ignore[assignment]  # noqa: RUF005
        offsets = offsets + (offset,)  # type: ignore[assignment]  # noqa: RUF005
    return gains, offsets


@triton.jit
def _one_token(
    x,
    gains,
    offsets,
    out_ptr,
    out_scale_ptr,
    row,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    EPS: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
):
    """Norm, modulation, quantization and storing of one token's pieces."""
    k = tl.arange(0, WIDTH)
    total = x[0].to(tl.float32)
    for i in tl.static_range(1, len(x)):
        total += x[i].to(tl.float32)
    mean = tl.sum(total, axis=0) * (1.0 / K)
    squares = tl.zeros((WIDTH,), tl.float32)
    centred = ()
    for i in tl.static_range(len(x)):
        piece = x[i].to(tl.float32) - mean
        if (i + 1) * WIDTH > K:
            piece = tl.where(i * WIDTH + k < K, piece, 0.0)
        squares += piece * piece
        centred = centred + (piece,)  # type: ignore[assignment]  # noqa: RUF005
    rstd = tl.rsqrt(tl.sum(squares, axis=0) * (1.0 / K) + EPS)
    y = ()
    most = tl.zeros((WIDTH,), tl.float32)
    for i in tl.static_range(len(x)):
        piece = centred[i] * rstd * gains[i] + offsets[i]  # offsets and gains are 0 and 1 behind the end
        y = y + (piece,)  # type: ignore[assignment]  # noqa: RUF005
        # A NaN shall be the largest of all, or a row would look sound.
        most = tl.maximum(most, tl.abs(piece), propagate_nan=tl.PropagateNan.ALL)
    out = out_ptr + row * K
    factor = 1.0
    if QUANTIZE:
        amax = scale_of(magnitude(most), 0, FLOOR)
        factor = QMAX / amax
        tl.store(out_scale_ptr + row, amax * (1.0 / QMAX))
    for i in tl.static_range(len(x)):
        if not QUANTIZE:
            piece = y[i].to(out_ptr.dtype.element_ty)
        else:
            piece = rounded(y[i] * factor, FP8)
        if (i + 1) * WIDTH > K:
            tl.store(out + i * WIDTH + k, piece, mask=i * WIDTH + k < K)
        else:
            tl.store(out + i * WIDTH + k, piece)


@triton.jit
def adaln_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    input_scale_ptr,
    out_ptr,
    out_scale_ptr,
    tokens,
    stride_b,
    stride_s,
    shift_stride,
    scale_stride,
    K: tl.constexpr,
    EPS: tl.constexpr,
    QMAX: tl.constexpr,
    FLOOR: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    QUANTIZE: tl.constexpr,
    FP8: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """ROWS tokens of a picture: (x - mean) / sqrt(var + EPS) * (1 + scale) + shift, as they are or quantized."""
    batch = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * ROWS
    x_ptr += batch * stride_b
    scale_ptr += batch * scale_stride
    shift_ptr += batch * shift_stride
    x = _load(x_ptr + first.to(tl.int64) * stride_s, K, WIDTH)
    gains, offsets = _modulation(scale_ptr, shift_ptr, input_scale_ptr, HAS_COLUMNS, K, WIDTH)
    if ROWS == 1:
        row = batch * tokens + first
        _one_token(x, gains, offsets, out_ptr, out_scale_ptr, row, K, WIDTH, EPS, QMAX, FLOOR, QUANTIZE, FP8)
    else:
        # Behind the last token it is done again, which writes the same bytes; a mask would cost a predicate an access.
        for r in range(ROWS):
            following = _load(x_ptr + tl.minimum(first + r + 1, tokens - 1).to(tl.int64) * stride_s, K, WIDTH)
            row = batch * tokens + tl.minimum(first + r, tokens - 1)
            _one_token(x, gains, offsets, out_ptr, out_scale_ptr, row, K, WIDTH, EPS, QMAX, FLOOR, QUANTIZE, FP8)
            x = following


TILES: list[dict[str, int]] = [
    {"ROWS": 1, "WIDTH": 512, "num_warps": 2},
    {"ROWS": 1, "WIDTH": 256, "num_warps": 1},
    {"ROWS": 1, "WIDTH": 1024, "num_warps": 4},
    {"ROWS": 3, "WIDTH": 1024, "num_warps": 4},
    {"ROWS": 9, "WIDTH": 1024, "num_warps": 4},
    {"ROWS": 9, "WIDTH": 1024, "num_warps": 8},
]
"""Tokens of a program, features of a piece (8 a lane are 16 bytes) and warps: what the benchmark and tuning try.

Four blocks of the last two fit a multiprocessor, so that 9 tokens each are one wave of 4,608 on an H200.
"""


def label(tile: dict[str, int]) -> str:
    """A setting in words."""
    return "{ROWS} tokens, {num_warps} warps of {WIDTH}".format(**tile)


def launch_tile(features: int) -> dict[str, int]:
    """The settings without tuning: one token a program, a warp for 1,536 features."""
    warps = max(1, min(16, triton.next_power_of_2(features) // 2048))
    return {"ROWS": 1, "WIDTH": min(256 * warps, triton.next_power_of_2(features)), "num_warps": warps}


def _launch(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None,
    out: Tensor,
    out_scale: Tensor,
    dtype: str | None,
    eps: float,
    tile: dict[str, int] | None = None,
) -> None:
    batch, tokens, features = x.shape
    x, shift, scale = contiguous_features(x), contiguous_features(shift), contiguous_features(scale)
    if tile is None:
        found = tuning.lookup(x.device, tuning.adaln(dtype), batch * tokens, features, features)
        tile = launch_tile(features) if found is None else found.config
    if batch * tokens:
        adaln_kernel[(triton.cdiv(tokens, tile["ROWS"]), batch)](
            x,
            shift,
            scale,
            x if input_scale is None else input_scale,
            out,
            out_scale,
            tokens,
            x.stride(0),
            x.stride(1),
            shift.stride(0),
            scale.stride(0),
            K=features,
            EPS=eps,
            QMAX=QMAX[dtype or "int8"],
            FLOOR=AMAX_FLOOR,
            HAS_COLUMNS=input_scale is not None,
            QUANTIZE=dtype is not None,
            FP8=dtype == "float8_e4m3fn",
            **tile,
        )


def adaln(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """See `tritflow.kernels.adaln`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, shift, scale, None, out, out, None, eps)
    return out


def adaln_quantize(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    input_scale: Tensor | None = None,
    dtype: str = "int8",
    eps: float = 1e-6,
    tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """See `tritflow.kernels.adaln_quantize`; `tile`, one like those of `TILES`, replaces the tuned choice."""
    tokens = x.shape[0] * x.shape[1]
    q = torch.empty((tokens, x.shape[2]), dtype=QTYPE[dtype], device=x.device)
    out_scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    _launch(x, shift, scale, input_scale, q, out_scale, dtype, eps, tile)
    return q, out_scale
