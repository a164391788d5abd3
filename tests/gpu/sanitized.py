"""What test_sanitizer_gpu.py runs under compute-sanitizer: products of small shapes; cubins go to a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from tritflow.formats.packing import pack_2bit
from tritflow.kernels import adaln_quantize, gelu_quantize, w2a8_linear, w2a16_linear
from tritflow.kernels.hopper.gemm import w2a8_kernel
from tritflow.kernels.hopper.skinny import w2a16_skinny


@gluon.jit
def _add(out, i: gl.constexpr):
    gl.store(out + i, gl.load(out + i) + 1)


@gluon.jit
def partitions_kernel(out):
    """Three partitions that share nothing: what racecheck says of it, it says of how partitions are started."""
    gl.warp_specialize([(_add, (out, 0)), (_add, (out, 1)), (_add, (out, 2))], [4, 1], [24, 24])


def main(folder: Path) -> None:
    g = torch.Generator().manual_seed(0)
    for m, n, k in [(64, 256, 256), (200, 384, 1152), (1, 256, 256)]:
        weight = pack_2bit(torch.randint(-1, 2, (n, k), generator=g, dtype=torch.int8)).cuda()
        x = torch.randn(m, k, generator=g).bfloat16().cuda()
        row = torch.ones(n, device="cuda").bfloat16()
        for backend in ("hopper", "triton"):
            if m >= 64:
                for dtype in ("int8", "float8_e4m3fn"):
                    w2a8_linear(x, weight, row, None, None, dtype, backend)
            w2a16_linear(x, weight, row, None, None, backend)
    for n, k in ((256, 3072), (200, 264)):
        weight = pack_2bit(torch.randint(-1, 2, (n, k), generator=g, dtype=torch.int8)).cuda()
        x, row = torch.randn(1, k, generator=g).bfloat16().cuda(), torch.ones(n, device="cuda").bfloat16()
        for early in (False, True):
            w2a16_skinny(x, weight, row, rows=16, digits=True, early=early)
        w2a16_skinny(x, weight, row)
    x, vector = torch.randn(1, 70, 256).bfloat16().cuda(), torch.randn(1, 256).bfloat16().cuda()
    adaln_quantize(x, vector, vector, None, "int8", 1e-6)
    gelu_quantize(x, None, None, "int8")
    partitions_kernel[(1,)](torch.zeros(3, dtype=torch.int32, device="cuda"), num_warps=4)
    torch.cuda.synchronize()
    for name, kernel in (("w2a8_kernel", w2a8_kernel), ("partitions_kernel", partitions_kernel)):
        for caches in kernel.device_caches.values():
            for i, compiled in enumerate(caches[0].values()):
                (folder / f"{name}.{i}.cubin").write_bytes(compiled.asm["cubin"])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
