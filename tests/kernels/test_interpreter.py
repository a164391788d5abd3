"""Every test that is marked `inside`, in processes that run Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import INSIDE

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(INSIDE, reason="this is the run inside")

HERE = Path(__file__).parent
GROUPS = [["test_triton_attention.py"], ["test_triton_block.py", "test_triton.py", "test_low_rank.py"]]


@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_kernels_through_the_interpreter(names: list[str]) -> None:
    """One process for several files: a start takes as long as most of them."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", "-rp"]
        + [str(HERE / name) for name in names],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = [line for line in done.stdout.splitlines() if line.startswith("PASSED ")]
    for name in names:
        assert any(f"/{name}::" in line for line in passed), name


def test_no_file_is_left_out() -> None:
    marked = {p.name for p in HERE.glob("test_*.py") if "\n@inside\n" in p.read_text()}
    assert marked == {name for names in GROUPS for name in names}
