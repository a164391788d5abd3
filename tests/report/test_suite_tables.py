"""The paper's Tables 1 and 2 and the differences, drawn from the results of tiny runs of both suites."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from suite_fakes import (
    SETTINGS,
    CompBenchTask,
    GenEvalTask,
    ScriptedColors,
    ScriptedDetector,
    draw,
    options,
    small_suites,
)
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation.api import Task
from tritflow.evaluation.images import ModelId
from tritflow.evaluation.run import Contender, Plan, Sampling, evaluate
from tritflow.evaluation.scorers.detection import Detection
from tritflow.report.formats import FORMATS
from tritflow.report.sources import collect
from tritflow.report.tables import build, load_specs, lookup
from tritflow.results import append


class Vqa:
    name = "scripted vqa"

    def ask(self, pictures: Any, phrases: Any) -> list[list[float]]:
        return [[float(p[0, 1, 0]) / 255 for _ in mine] for p, mine in zip(pictures, phrases, strict=True)]


class Depth:
    name = "scripted depth"

    def depth(self, pictures: Any, height: int, width: int) -> list[Any]:
        import numpy as np

        return [np.repeat(np.linspace(1, 0, width)[:, None], height, 1).astype(np.float32) for _ in pictures]


class Judge:
    name = "scripted judge"

    def grade(self, pictures: Any, prompts: Any, category: str) -> list[int]:
        return [1 + int(p[0, 1, 0]) % 5 for p in pictures]


def sees(picture: Any, wanted: list[str]) -> list[Detection]:
    """All that is asked for, side by side, on two pictures of three; on the others the first object alone."""
    names = wanted if int(picture[0, 1, 0]) % 3 else wanted[:1]
    return [Detection(n, 0.95, (6 * i, 0, 6 * i + 5, 5)) for i, n in enumerate(names)]


def scripted(kind: type[Task], prompts: Path) -> Any:
    task = kind(options(prompts))
    if isinstance(task, GenEvalTask):
        task.load(ScriptedDetector(sees), ScriptedColors({"cow": "red", "bench": "blue"}))
    elif isinstance(task, CompBenchTask):
        task.use(vqa=Vqa(), detector=ScriptedDetector(sees), depth=Depth(), judge=Judge())
    return task


def dimmed(prompts: list[str], seeds: list[int]) -> list[Image.Image]:
    return [p.point(lambda v: v * 7 // 8) for p in draw(prompts, seeds)]


TEACHER = Contender(ModelId("FLUX", "tttt"), SETTINGS, lambda: draw)
STUDENT = Contender(ModelId("ternary", "ssss"), replace(SETTINGS, extra={"mode": "w2a16"}), lambda: dimmed)
OFF = replace(STUDENT, settings=replace(SETTINGS, extra={"mode": "w2a16", "backend": "reference"}))


def table_of(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table below a heading of report.md."""
    lines = text.split(f"## {heading}\n", 1)[1].splitlines()
    rows = [line for line in lines[: lines.index("", 1 + lines[1:].index(""))] if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


@pytest.fixture(params=[GenEvalTask, CompBenchTask])
def runs(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Path]:
    kind = request.param
    prompts = small_suites(tmp_path / "prompts", monkeypatch)
    out = tmp_path / "out"
    for label, who, plan in (("1.58-bit", STUDENT, Plan(noise_seed=9)), ("1.58-bit", OFF, Plan())):
        task = scripted(kind, prompts)
        run = evaluate(
            task, task.prompts(), who, out, teacher=TEACHER, sampling=Sampling(3, 0, 4), label=label, plan=plan
        )
        append(out / "results.json", task.name, run)
    return kind, out


def test_the_papers_tables_with_ours_below(runs: tuple[Any, Path], tmp_path: Path) -> None:
    kind, out = runs
    done = CliRunner().invoke(app, ["report", str(out), "--out", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    text = (tmp_path / "report" / "report.md").read_text()
    title = "GenEval" if kind is GenEvalTask else "T2I-CompBench"
    head, _, *rows = table_of(text, title)
    stored = collect([out]).runs[kind.name]
    # The paper's rows first, then the teacher, the ternary model with kernels on and off.
    assert [r[:3] for r in rows] == [
        ["FLUX (paper)", "–", "official scorer"],
        ["1.58-bit (paper)", "off", "official scorer"],
        ["1.58-bit (paper)", "on", "official scorer"],
        ["FLUX (teacher)", "–", "substitutes"],
        ["1.58-bit", "on", "substitutes"],
        ["1.58-bit", "off", "substitutes"],
    ]
    digits = 3 if kind is GenEvalTask else 4
    overall = [r[3] for r in rows[3:]]
    assert overall == [
        f"{stored[0]['against']['scores']['overall']['value']:.{digits}f}",
        *(f"{run['scores']['overall']['value']:.{digits}f}" for run in stored),
    ]
    assert len(head) == 3 + 1 + len(kind.tags) + 1
    assert rows[3][-1] == "–"  # a teacher does not differ from itself
    assert all(cell not in ("", "–") for row in rows[4:] for cell in row)
    assert "not the suite's official metric" in text


def test_the_differences_say_how_sure_they_are(runs: tuple[Any, Path]) -> None:
    kind, out = runs
    stored = collect([out]).runs[kind.name]
    table = build(load_specs()[f"{kind.name}-differences"], stored)
    names = [c.name for c in table.spec.columns]
    rows = [dict(zip(names, cells, strict=True)) for cells in table.cells]
    assert [r["tag"] for r in rows] == ["overall", *kind.tags] * 2
    assert [r["kernel"] for r in rows] == ["on"] * (1 + len(kind.tags)) + ["off"] * (1 + len(kind.tags))
    digits = 3 if kind is GenEvalTask else 4
    first = stored[0]
    for row, at in zip(rows, ["overall", *(f"tags.{t}" for t in kind.tags)], strict=False):
        paired = lookup(first, f"paired.{at}")
        assert row["score"] == f"{lookup(first, f'scores.{at}.value'):.{digits}f}"
        assert row["teacher"] == f"{lookup(first, f'against.scores.{at}.value'):.{digits}f}"
        assert row["difference"] == FORMATS["difference"](paired["difference"])
        assert "[" in row["difference"] or paired["difference"]["low"] is None
        assert ("McNemar p" in row) == (kind is GenEvalTask)
        if kind is GenEvalTask:
            assert row["McNemar p"] == f"{paired['mcnemar']['p_value']:.3f}"
        assert row["another seed set"] not in ("", "–")
        assert row["seeds alone (sd)"] != "–"
    assert rows[0]["smallest that shows"] == "–" or float(rows[0]["smallest that shows"]) >= 0
    assert rows[1 + len(kind.tags)]["another seed set"] == "–"  # that run drew one set


def test_a_teacher_with_a_run_of_its_own_stands_once(runs: tuple[Any, Path], tmp_path: Path) -> None:
    kind, out = runs
    task = scripted(kind, tmp_path / "prompts")
    own = evaluate(task, task.prompts(), TEACHER, out, sampling=Sampling(3, 0, 4), label="FLUX.1-dev")
    append(out / "results.json", task.name, own)
    table = build(load_specs()[kind.name], collect([out]).runs[kind.name])
    assert [c[0] for c in table.cells[3:]] == ["1.58-bit", "1.58-bit", "FLUX.1-dev"]
