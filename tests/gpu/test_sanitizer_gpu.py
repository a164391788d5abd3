"""compute-sanitizer: memcheck is clean, and racecheck sees nothing but how the compiler starts partitions.

Triton keeps a byte a warp in shared memory that says which partition comes next. The first partition's warps write
it, all warps meet at `barrier.sync 1`, the others read it, all meet there again before anything runs and once more
before it is written anew: never both between two of these barriers. racecheck reports it all the same; the warps arrive
at them from different instructions. So a report is accepted if its read is a one byte load, which the kernels
themselves never do, and its writes go to the same 16 bytes.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu
PROGRAM = Path(__file__).with_name("sanitized.py")
SANITIZER = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
needs_sanitizer = pytest.mark.skipif(SANITIZER is None, reason="no compute-sanitizer here")
_HAZARD = re.compile(r"(Read|Write) access at (\w+)\+0x([0-9a-f]+)")
_SHARED = re.compile(r"/\*([0-9a-f]+)\*/\s+(?:@\S+ )?(LDS|STS)\S* .*\[\S*?\+?(0x[0-9a-f]+)\]")


def _run(tool: str, folder: Path) -> str:
    command = [str(SANITIZER), "--tool", tool, "--print-limit", "200", sys.executable, str(PROGRAM), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    text = done.stdout + done.stderr
    assert "SUMMARY" in text, text[-2000:]
    return text


def _shared(folder: Path, kernel: str) -> list[dict[int, tuple[str, int]]]:
    """Of each of a kernel's cubins: instruction's offset -> ("LDS.U8" and so on, address)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    found = []
    for cubin in sorted(folder.glob(f"{kernel}.*.cubin")):
        listing = subprocess.run([str(tool), "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
        found.append({int(m[1], 16): (m[2], int(m[3], 16)) for m in _SHARED.finditer(listing)})
    return found


def _starts_a_partition(cubins: list[dict[int, tuple[str, int]]], read: int, writes: list[int]) -> bool:
    for at in cubins:
        if all(offset in at for offset in (read, *writes)):
            state = at[read][1]
            if at[read][0] == "LDS" and all(at[w][0] == "STS" and abs(at[w][1] - state) < 16 for w in writes):
                return True
    return False


@needs_sanitizer
def test_memcheck_is_clean(tmp_path: Path) -> None:
    assert "ERROR SUMMARY: 0 errors" in _run("memcheck", tmp_path)


@needs_sanitizer
def test_racecheck_sees_only_the_start_of_partitions(tmp_path: Path) -> None:
    text = _run("racecheck", tmp_path)
    reports = text.split("========= Error:")[1:]
    print(text)
    for report in reports:
        accesses = [(kind, name, int(offset, 16)) for kind, name, offset in _HAZARD.findall(report)]
        reads = [offset for kind, _, offset in accesses if kind == "Read"]
        writes = [offset for kind, _, offset in accesses if kind == "Write"]
        assert len(reads) == 1, report
        assert _starts_a_partition(_shared(tmp_path, accesses[0][1]), reads[0], writes), report
