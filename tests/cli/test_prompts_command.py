"""`tritflow prompts`: what is there, what it holds, and clear words when it does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tritflow.calibration.prompt_sources import FILES
from tritflow.cli.main import app

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")


def invoke(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["prompts", *map(str, arguments)])


@needs_files
def test_every_suite_is_listed_with_its_checksum() -> None:
    done = invoke("list", "--folder", SHARED, "--json")
    assert done.exit_code == 0, done.output
    rows = json.loads(done.stdout)
    assert [r["file"] for r in rows] == [f"{f.suite}/{f.name}" for f in FILES]
    assert all(r["state"] == "present" and len(r["sha256"]) == 64 and len(r["commit"]) == 40 for r in rows)
    by_suite: dict[str, int] = {}
    for r in rows:
        suite = r["file"].partition("/")[0]
        by_suite[suite] = by_suite.get(suite, 0) + r["prompts"]
    assert by_suite == {"partiprompts": 1632, "t2i_compbench": 8000, "geneval": 553}


@needs_files
@pytest.mark.parametrize(
    ("arguments", "count", "shared"),
    [
        (["geneval"], 553, 0),
        (["t2i-compbench", "--split", "val"], 2400, 6),
        (["t2i_compbench", "--split", "val", "--category", "spatial"], 300, 2),
        (["partiprompts"], 1632, 1631),  # two of them differ in their full stop alone
    ],
)
def test_counts_and_overlap_with_the_papers(arguments: list[str], count: int, shared: int) -> None:
    done = invoke("show", *arguments, "--against", "paper", "--folder", SHARED, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["count"] == len(found["prompts"]) == count
    assert len(found["sha256"]) == 64
    assert len(found["overlap"]) == shared


@needs_files
def test_a_split_that_a_suite_has_not() -> None:
    done = invoke("show", "geneval", "--split", "val", "--folder", SHARED)
    assert done.exit_code == 2
    assert "geneval has no such prompts (splits: test; categories: color_attr, colors" in done.output


def test_missing_files_say_the_way_out(tmp_path: Path) -> None:
    done = invoke("show", "geneval", "--folder", tmp_path)
    assert done.exit_code == 2
    assert "tritflow prompts fetch" in done.output
    listed = invoke("list", "--folder", tmp_path)
    assert sum(line.startswith("missing ") for line in listed.output.splitlines()) == len(FILES)
    path = FILES[0].at(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("other\n")
    assert "damaged" in invoke("list", "--folder", tmp_path).output


def test_nothing_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    done = invoke("fetch", "--folder", tmp_path)
    assert done.exit_code == 2
    assert "cannot fetch PartiPrompts.tsv" in done.output
    assert len(done.output.strip().splitlines()) == 1
