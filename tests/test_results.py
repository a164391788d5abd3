"""Append-only results files."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tritflow import results


def test_append_keeps_what_was_there(tmp_path: Path) -> None:
    path = results.path_for(tmp_path, "scenes", "NVIDIA H200, rev (2)")
    assert path.name == "scenes-nvidia-h200-rev-2.json"
    first = results.append(path, "scenes", {"label": "a", "x": 1})
    text = path.read_text()
    results.append(path, "scenes", {"label": "b", "x": 0.1})
    assert [r["label"] for r in results.read(path)] == ["a", "b"]
    assert results.read(path)[0]["id"] == first["id"]
    assert path.read_text().startswith(text[: text.rindex("}\n ]")].rstrip())


def test_the_same_run_is_not_added_twice(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    run = {"label": "x", "value": 1.5}
    first = results.append(path, "speed", run)
    assert results.append(path, "speed", dict(run)) == first
    results.append(path, "speed", {**run, "value": 1.25})
    assert [r["value"] for r in results.read(path)] == [1.5, 1.25]


def test_edited_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.append(path, "scenes", {"score": 0.5})
    good = path.read_text()
    path.write_text(good.replace("0.5", "0.9"))
    with pytest.raises(results.ResultsError, match="run 0 was altered"):
        results.read(path)
    path.write_text(good[:-8])
    with pytest.raises(results.ResultsError, match="not a whole JSON file"):
        results.append(path, "scenes", {})
    path.write_text(good.replace('"schema": 1', '"schema": 2'))
    with pytest.raises(results.ResultsError, match="schema 2"):
        results.read(path)
    path.write_text("[]")
    with pytest.raises(results.ResultsError, match="not a results file"):
        results.read(path)
    path.write_text(good)
    with pytest.raises(results.ResultsError, match="of 'scenes', not of 'latency'"):
        results.append(path, "latency", {})
    with pytest.raises(results.ResultsError, match="no such"):
        results.read(tmp_path / "none.json")


def test_numbers_that_json_lacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        results.append(tmp_path / "a.json", "t", {"x": math.nan})
    assert not (tmp_path / "a.json").exists()


def test_two_writers_lose_nothing(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: results.append(tmp_path / "a.json", "t", {"i": i}), range(20)))
    assert sorted(r["i"] for r in results.read(tmp_path / "a.json")) == list(range(20))


def test_provenance_names_device_and_versions() -> None:
    found = results.provenance()
    assert "core" in found["device"]
    assert {"python", "torch", "numpy"} <= set(found["versions"])
    json.dumps(found)
