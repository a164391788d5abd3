"""The plain Triton kernels compile for GPUs that are not here, and their machine code keeps what speed rests on."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles_and_fits_shared_memory(target):
    from tritflow.kernels.triton import aot

    compiled = 0
    for case in aot.cases():
        if aot.why_not(case, target) is not None:
            continue
        kernel = case.compile(target)
        assert kernel.metadata.shared <= aot.SHARED_MEMORY[target] * 1024, case.name
        compiled += 1
    missing = len([case for case in aot.cases() if case.fp8]) if target in ("sm_80", "sm_86", "gfx942") else 0
    assert compiled == len(aot.cases()) - missing


def test_all_targets_are_tried():
    from tritflow.kernels.triton import aot

    assert tuple(aot.TARGETS) == TARGETS == tuple(aot.SHARED_MEMORY)
    assert len({case.name for case in aot.cases()}) == len(aot.cases())


def _assembled(kernel, folder):
    """What the assembler says of registers and spills on Hopper."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    (folder / "k.ptx").write_text(kernel.asm["ptx"])
    command = [tools / "ptxas", "-v", "--gpu-name=sm_90a", folder / "k.ptx", "-o", folder / "k.cubin"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize("kind", ["fp8", "int8"])
def test_the_hopper_product_reads_its_weight_from_registers_and_spills_nothing(kind, tmp_path):
    from tritflow.kernels.triton import aot

    (case,) = (c for c in aot.cases() if c.name == f"w2a8 {kind}, 4608 tokens")
    kernel = case.compile("sm_90")
    assert "wgmma.mma_async" in kernel.asm["ptx"]
    log = _assembled(kernel, tmp_path)
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"]
    assert "C75" not in log  # ptxas says there when it serialises wgmma


@pytest.mark.parametrize(
    ("name", "registers"),
    [
        ("adaln + quantize int8, 1 tokens, 2 warps", 168),  # six blocks of 64 threads a multiprocessor
        ("adaln + quantize int8, 9 tokens, 4 warps", 128),
        ("norm, rotate, quantize for attention int8, two streams", 128),  # one block of 512
        ("low rank, down int8, 4608 tokens, 16 columns", 128),
    ],
)
def test_passes_keep_their_rows_in_registers(name, registers, tmp_path):
    from tritflow.kernels.triton import aot

    (case,) = (c for c in aot.cases() if c.name == name)
    kernel = case.compile("sm_90")
    log = _assembled(kernel, tmp_path)
    assert re.findall(r"(\d+) bytes spill stores", log) == ["0"]
    assert int(re.findall(r"Used (\d+) registers", log)[0]) <= registers
