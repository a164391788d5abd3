"""Marks tests that run in Triton's interpreter: it reads its switch while kernels are defined, hence in a process of
its own, which `test_interpreter.py` starts."""

from __future__ import annotations

import os

import pytest

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
outside = pytest.mark.skipif(INSIDE, reason="this is the run inside")
inside = pytest.mark.skipif(not INSIDE, reason="test_interpreter.py runs it inside the interpreter")
