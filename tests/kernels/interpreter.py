"""Run a test file through Triton's interpreter: Triton reads its switch while kernels are defined, hence a process."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
outside = pytest.mark.skipif(INSIDE, reason="this is the run inside")
inside = pytest.mark.skipif(not INSIDE, reason="runs inside the interpreter")


def run_inside(file: str) -> None:
    """The tests of `file` that are marked `inside`, in a process of their own."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", file],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
