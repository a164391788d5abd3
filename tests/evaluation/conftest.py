"""Fixtures of the paper's suites."""

from __future__ import annotations

from pathlib import Path

import pytest
from suite_fakes import small_suites


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a few prompts of every suite, in place of the real files."""
    return small_suites(tmp_path / "prompts", monkeypatch)
