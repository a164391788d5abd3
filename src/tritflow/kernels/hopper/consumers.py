"""The matrix product of `hopper.gemm` in tiles of 64, 128 or 192 tokens by 128, 192 or 256 weight rows.

Same operands, same decoding, one consumer for every 64 weight rows. 192 x 192 is what fills 132 multiprocessors where
the tiles of 128 x 256 leave a last wave mostly empty (24 x 16 tiles of a [4608, 3072] output are 2.91 waves, 36 x 12
are 3.27), and each decoded weight meets half as many tokens more; 64 x 192 does the same for 512 tokens. Tensors have
powers of two for sizes, so 192 tokens are 128 and 64. Which tile comes when is computed from the block's number, so
that nothing has to come from memory before the first copy is asked for.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tritflow.kernels.hopper.gemm import _decode, _packed_layout


@gluon.jit
def _tile(u, M, N, BM: gl.constexpr, BN: gl.constexpr, GROUP: gl.constexpr):
    """First token and first weight row of tile u: bands of GROUP token tiles, so that a wave shares what it reads."""
    tiles_m = (M + BM - 1) // BM
    tiles_n = (N + BN - 1) // BN
    band = u // (GROUP * tiles_n)
    height = gl.minimum(tiles_m - band * GROUP, GROUP)
    rest = u - band * GROUP * tiles_n
    return (band * GROUP + rest % height) * BM, rest // height * BN


@gluon.jit
def _load(
    descs, buffers, M, N, steps,
    BM: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr,
):  # fmt: skip
    """The copying warp: fills a ring of stages, each one K step of activations and packed weights."""
    x_desc, more_desc, w_desc, _out, _more_out = descs
    x_bufs, more_bufs, w_bufs, _outs, _more_outs, full, empty, _lag = buffers
    BN: gl.constexpr = CONSUMERS * 64
    stage = 0
    phase = 1
    for u in range(gl.program_id(0), (M + BM - 1) // BM * ((N + BN - 1) // BN), gl.num_programs(0)):
        token, row = _tile(u, M, N, BM, BN, GROUP)
        for k in range(steps):
            mbarrier.wait(empty.index(stage), phase)
            bar = full.index(stage)
            mbarrier.expect(bar, BM * 16 * x_desc.dtype.primitive_bitwidth + BN * 32)
            for part in gl.static_range(CONSUMERS):
                at = stage * CONSUMERS + part
                tma.async_copy_global_to_shared(w_desc, [row + part * 64, k * 32], bar, w_bufs.index(at))
            tma.async_copy_global_to_shared(x_desc, [token, k * 128], bar, x_bufs.index(stage))
            if BM == 192:
                tma.async_copy_global_to_shared(more_desc, [token + 128, k * 128], bar, more_bufs.index(stage))
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def _scaled(acc, x_scale, token, w, b, M, bits: gl.constexpr, HAS_BIAS: gl.constexpr):
    """Sums as outputs: w and b by weight row, the tokens' scales from memory."""
    mma: gl.constexpr = acc.type.layout
    y = acc.to(gl.float32)
    if bits == 8:
        tokens = token + gl.arange(0, acc.shape[1], gl.SliceLayout(0, mma))
        y = y * gl.expand_dims(gl.load(x_scale + tokens, mask=tokens < M, other=0.0), 0)
    w = gl.expand_dims(gl.convert_layout(w, gl.SliceLayout(1, mma), assert_trivial=True), 1)
    if HAS_BIAS:
        return gl.fma(y, w, gl.expand_dims(gl.convert_layout(b, gl.SliceLayout(1, mma), assert_trivial=True), 1))
    return y * w


@gluon.jit
def _multiply(
    PART: gl.constexpr, descs, vectors, buffers, M, N, steps,
    BM: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr, LAG: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """A consumer: 64 weight rows of every tile of this block."""
    _x, _more_x, _w, out_desc, more_out_desc = descs
    x_scale, weight_scale, bias = vectors
    x_bufs, more_bufs, w_bufs, out_bufs, more_out_bufs, full, empty, lag = buffers
    BN: gl.constexpr = CONSUMERS * 64
    dtype: gl.constexpr = x_bufs.dtype
    bits: gl.constexpr = dtype.primitive_bitwidth
    acc_type: gl.constexpr = gl.int32 if dtype == gl.int8 else gl.float32
    unit: gl.constexpr = 0.015625 if dtype == gl.int8 else 0.5  # what a weight of +1 reads as is 1 / unit
    FIRST: gl.constexpr = x_bufs.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, FIRST, 256 // bits]
    )
    more_mma: gl.constexpr = gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 256 // bits]
    )
    a_layout: gl.constexpr = gl.DotOperandLayout(0, mma, 32 // bits)
    more_a_layout: gl.constexpr = gl.DotOperandLayout(0, more_mma, 32 // bits)
    packed_layout: gl.constexpr = _packed_layout(64, bits)

    stage = 0
    phase = 0
    count = 0
    if LAG > 0 and PART > 0:
        mbarrier.wait(lag.index(PART - 1), 0)
    for u in range(gl.program_id(0), (M + BM - 1) // BM * ((N + BN - 1) // BN), gl.num_programs(0)):
        token, row = _tile(u, M, N, BM, BN, GROUP)
        rows = row + PART * 64 + gl.arange(0, 64, gl.SliceLayout(1, mma))
        w = gl.load(weight_scale + rows, mask=rows < N, other=0.0).to(gl.float32) * unit
        b = w
        if HAS_BIAS:
            b = gl.load(bias + rows, mask=rows < N, other=0.0).to(gl.float32)
        acc = gl.zeros((64, FIRST), acc_type, mma)
        more = gl.zeros((64, 64), acc_type, more_mma)
        for k in range(steps):
            mbarrier.wait(full.index(stage), phase)
            packed = w_bufs.index(stage * CONSUMERS + PART).load(packed_layout)
            a = _decode(packed, dtype, a_layout, 64)
            x = x_bufs.index(stage).permute((1, 0))
            acc = warpgroup_mma(a, x, acc, use_acc=k > 0, is_async=True)
            if BM == 192:
                more_a = gl.convert_layout(a, more_a_layout, assert_trivial=True)
                more_x = more_bufs.index(stage).permute((1, 0))
                more = warpgroup_mma(more_a, more_x, more, use_acc=k > 0, is_async=True)
                acc, more = warpgroup_mma_wait(0, deps=[acc, more])
            else:
                acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty.index(stage), count=1)
            stage += 1
            if stage == STAGES:
                stage = 0
                phase ^= 1
            if LAG > 0 and PART < CONSUMERS - 1:
                count += 1
                if count == LAG:
                    mbarrier.arrive(lag.index(PART), count=1)

        tma.store_wait(0)
        gl.thread_barrier()
        out = out_bufs.index(PART)
        out.permute((1, 0)).store(_scaled(acc, x_scale, token, w, b, M, bits, HAS_BIAS).to(out_desc.dtype))
        if BM == 192:
            more_out = more_out_bufs.index(PART)
            y = _scaled(more, x_scale, token + 128, w, b, M, bits, HAS_BIAS)
            more_out.permute((1, 0)).store(y.to(out_desc.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(out_desc, [token, row + PART * 64], out)
        if BM == 192:
            tma.async_copy_shared_to_global(more_out_desc, [token + 128, row + PART * 64], more_out)
    if LAG > 0 and PART < CONSUMERS - 1:  # noqa: SIM102 - one is known to the compiler, the other is not
        if count < LAG:
            mbarrier.arrive(lag.index(PART), count=1)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["M", "N", "steps"])
def consumers_kernel(
    x_desc, more_desc, w_desc, out_desc, more_out_desc, x_scale, weight_scale, bias, M, N, steps,
    BM: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr, LAG: gl.constexpr,
    HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Launch with 4 warps (the first consumer) and at most a block a tile.

    x_desc [M, K], blocks [min(BM, 128), 128]; more_desc the same, blocks [64, 128]; w_desc [N, K / 4] uint8, blocks
    [64, 32]; out_desc and more_out_desc [M, N], blocks [min(BM, 128), 64] and [64, 64]; steps of 128 K; the rest as in
    `gemm.w2a8_kernel`.
    """
    FIRST: gl.constexpr = x_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, FIRST, 128], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.uint8, [STAGES * CONSUMERS, 64, 32], w_desc.layout)
    out_bufs = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, FIRST, 64], out_desc.layout)
    more_bufs = x_bufs
    more_out_bufs = out_bufs
    if BM == 192:
        more_bufs = gl.allocate_shared_memory(x_desc.dtype, [STAGES, 64, 128], more_desc.layout)
        more_out_bufs = gl.allocate_shared_memory(out_desc.dtype, [CONSUMERS, 64, 64], more_out_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    lag = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(lag.index(i), count=1)
    fence_async_shared()
    gl.thread_barrier()
    descs = (x_desc, more_desc, w_desc, out_desc, more_out_desc)
    vecs = (x_scale, weight_scale, bias)
    bufs = (x_bufs, more_bufs, w_bufs, out_bufs, more_out_bufs, full, empty, lag)
    # Written out three times, since a tuple that has a name holds no constants.
    if CONSUMERS == 2:
        gl.warp_specialize([
            (_multiply, (gl.constexpr(0), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_multiply, (gl.constexpr(1), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_load, (descs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP)),
        ], [4, 1], [232, 24])  # fmt: skip
    elif CONSUMERS == 3:
        gl.warp_specialize([
            (_multiply, (gl.constexpr(0), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_multiply, (gl.constexpr(1), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_multiply, (gl.constexpr(2), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_load, (descs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP)),
        ], [4, 4, 1], [160, 160, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (gl.constexpr(0), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_multiply, (gl.constexpr(1), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_multiply, (gl.constexpr(2), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_multiply, (gl.constexpr(3), descs, vecs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP, LAG, HAS_BIAS)),
            (_load, (descs, bufs, M, N, steps, BM, STAGES, CONSUMERS, GROUP)),
        ], [4, 4, 4, 1], [112, 112, 112, 24])  # fmt: skip
