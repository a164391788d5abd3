"""What Table 3 is made of, and what happens when its extra row cannot be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tritflow.profiling import end_to_end
from tritflow.reproduction import run as way
from tritflow.reproduction.request import Request
from tritflow.reproduction.stages import stages


def measured(request: Request, name: str) -> None:
    next(s for s in stages(request) if s.name == name).run(lambda *_: None)


def test_a_failed_extra_is_told_and_stops_nothing(
    tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(str(tiny_flux), tmp_path, "absmean", ("scenes",), 1, 1, steps=1, rounds=1, device="cpu")
    for name in ("quantize", "storage"):
        measured(request, name)
    whole = end_to_end.measure

    def fails(*args: Any, optimized: bool, **kwargs: Any) -> Any:
        if optimized:
            raise RuntimeError("no kernel for this device")
        return whole(*args, **kwargs)

    monkeypatch.setattr(end_to_end, "measure", fails)
    measured(request, "latency")
    line = way.costs_line(request)
    assert "optimized could not be timed (RuntimeError: no kernel for this device)" in line
    assert "of 1 steps on " in line

    def all_fail(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no picture")

    monkeypatch.setattr(end_to_end, "measure", all_fail)
    with pytest.raises(RuntimeError, match="no picture"):
        measured(request, "latency")
