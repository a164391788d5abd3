"""Tables from specs, and the generated blocks of pages."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from tritflow.report import formats
from tritflow.report.pages import render, stale_pages, update
from tritflow.report.sources import ReportError, collect
from tritflow.report.tables import build, load_specs, lookup, markdown

SPECS = load_specs(
    """
[quality]
topic = "toy"
rows = [{ label = "teacher" }, { label = "absmean" }, { label = "never run" }]
columns = [
  { name = "", value = "label" },
  { name = "light", value = "scores.tags.light", format = "point" },
  { name = "overall", value = "scores.overall", format = "score" },
  { name = "kept", value = "paired.overall.kept", format = "percent" },
  { name = "PSNR", value = "fidelity.psnr", format = "dB" },
]
note = "A note."

[tags]
topic = "toy"
where = { label = "absmean" }
entries = "scores.tags"
columns = [
  { name = "tag", value = "key" },
  { name = "score", value = ".", format = "score" },
  { name = "n", value = "n", format = "int" },
  { name = "run", value = "^label" },
]
"""
)


QUALITY_COLUMNS = """
columns = [
  { name = "", value = "label" },
  { name = "overall", value = "scores.overall", format = "point" },
]
"""


def run(label: str, value: float, time: str = "2026-01-02T00:00:00Z", **more: object) -> dict:
    score = {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 40, "method": "m"}
    return {"label": label, "time": time, "scores": {"overall": score, "tags": {"light": score}}, **more}


def test_rows_take_the_newest_run_in_the_specs_order() -> None:
    runs = [run("absmean", 0.1), run("teacher", 0.9), run("absmean", 0.2)]
    table = build(SPECS["quality"], runs)
    assert table.cells == (
        ("teacher", "0.900", "0.900 [0.850, 0.950]", "–", "–"),
        ("absmean", "0.200", "0.200 [0.150, 0.250]", "–", "–"),
    )


def test_entries_of_a_dict_become_rows() -> None:
    table = build(SPECS["tags"], [run("absmean", 0.2)])
    assert table.cells == (("light", "0.200 [0.150, 0.250]", "40", "absmean"),)


def test_a_run_without_any_number_is_left_out() -> None:
    assert build(SPECS["quality"], [{"label": "teacher"}]).cells == ()


def test_notes_say_device_versions_counts_and_intervals(evaluated: Path) -> None:
    runs = collect([evaluated]).runs["toy"]
    text = markdown(build(SPECS["quality"], runs))
    assert runs[0]["device"] in text
    assert f"torch {runs[0]['versions']['torch']}" in text
    assert "12 prompts x 2 pictures for each row" in text
    assert "95 % intervals (" in text
    assert text.splitlines()[0] == "|   | light | overall | kept | PSNR |"
    assert text.splitlines()[1] == "|---|---:|---:|---:|---:|"
    assert re.search(r"^\| absmean \| 0\.\d{3} \| .* % \[.*\] \| \d+\.\d\d \[", text, re.MULTILINE)


def test_a_prediction_is_not_called_measured() -> None:
    runs = [run("absmean", 0.1, device="datasheets", measured=False)]
    assert "Computed from datasheets." in markdown(build(SPECS["quality"], runs))
    runs.append(run("teacher", 0.9, device="a GPU"))
    assert "Measured on a GPU; datasheets." in markdown(build(SPECS["quality"], runs))


def test_the_packages_own_specs_are_sound() -> None:
    specs = load_specs()
    assert {"quality", "scores", "teacher", "storage", "cpu-latency", "detector", "bands"} <= set(specs)
    for spec in specs.values():
        assert "No results yet" in markdown(build(spec, []))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("[t]\nlike = 'u'", "table 't' is like 'u', which no table above it is"),
        ("[t]\ntopc = 'x'\ncolumns = [{ name = 'a', value = 'b' }]", "unknown key 'topc'; did you mean 'topic'"),
        ("[t]\ntopic = 'x'", "needs a topic and columns"),
        ("[t]\ntopic = 'x'\ncolumns = [{ name = 'a', value = 'b', format = 'scor' }]", "no format 'scor'.*'score'"),
    ],
)
def test_bad_specs_are_refused(source: str, words: str) -> None:
    with pytest.raises(ReportError, match=words):
        load_specs(source)


def test_lookup() -> None:
    data = {"a": [{"b": 1}], "c": None}
    assert lookup(data, "a.0.b") == 1
    assert lookup(data, "a.-1.b") == 1
    assert lookup(data, "a.1.b") is None
    assert lookup(data, "c.d") is None
    assert lookup(data, ".") is data


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("score", {"value": 0.5, "low": 0.25, "high": 0.75}, "0.500 [0.250, 0.750]"),
        ("score", {"value": 0.5, "low": None, "high": None}, "0.500"),
        ("score", None, "–"),
        ("score", {"value": None}, "–"),
        ("percent", {"value": 0.9512, "low": 0.9, "high": 1.0}, "95.1 % [90.0, 100.0]"),
        ("difference", {"value": -0.0001, "low": -0.01, "high": 0.02}, "0.000 [-0.010, +0.020]"),
        ("bytes", 3_110_000_000, "3.11 GB"),
        ("bytes", 5_540_000, "5.54 MB"),
        ("bytes", 12, "12 B"),
        ("int", 2212, "2,212"),
        ("ms", 12.345, "12.3"),
        ("ratio", 7.66, "7.66x"),
        ("text", "a | b\nc", "a \\| b c"),
        ("dB", 29.5, "29.50"),
    ],
)
def test_formats(name: str, value: object, expected: str) -> None:
    assert formats.FORMATS[name](value) == expected


PAGE = "# Title\n\n<!-- table:quality -->\nold\n<!-- /table -->\ntext `<!-- table:quality -->` stays\n"


def test_update_and_check(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    runs = {"toy": [run("teacher", 0.9)]}
    assert list(stale_pages([page], SPECS, runs)) == [page]
    assert page.read_text() == PAGE
    assert update([page], SPECS, runs) == [page]
    assert "| teacher | 0.900 |" in page.read_text()
    assert page.read_text().startswith("# Title\n\n<!-- table:quality -->\n|")
    assert page.read_text().endswith("<!-- /table -->\ntext `<!-- table:quality -->` stays\n")
    assert update([page], SPECS, runs) == []
    assert stale_pages([page], SPECS, runs) == {}
    assert list(stale_pages([page], SPECS, {"toy": [run("teacher", 0.8)]})) == [page]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("<!-- table:qualty -->\n<!-- /table -->\n", "no table 'qualty'; did you mean 'quality'"),
        ("<!-- table:quality -->\n", "'quality' is not closed"),
        ("<!-- table:quality -->\n<!-- table:tags -->\n<!-- /table -->\n", "'quality' is not closed"),
        ("<!-- /table -->\n<!-- table:tags -->\n<!-- /table -->\n", "closes nothing"),
        ("<!-- table:tags -->\n<!-- /table -->\n<!-- /table -->\n", "closes nothing"),
    ],
)
def test_bad_markers_are_refused(page: str, words: str) -> None:
    with pytest.raises(ReportError, match=words):
        render(page, SPECS, {})


def test_one_bad_page_leaves_all_untouched(tmp_path: Path) -> None:
    good, bad = tmp_path / "a.md", tmp_path / "b.md"
    good.write_text(PAGE)
    bad.write_text("<!-- table:nothing -->\n<!-- /table -->\n")
    with pytest.raises(ReportError, match=r"b\.md: there is no table 'nothing'"):
        update([good, bad], SPECS, {"toy": [run("teacher", 0.9)]})
    assert good.read_text() == PAGE


def test_collect_sorts_by_what_things_are(evaluated: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("")
    found = collect([evaluated, evaluated / "results.json", tmp_path / "docs"])
    assert [r["label"] for r in found.runs["toy"]] == ["teacher", "absmean"]  # each once
    assert [p.name for p in found.pictures] == ["student-b-ssssssss-w2a16", "teacher-tttttttt-w2a16"]
    assert [p.name for p in found.pages] == ["a.md"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ReportError, match="holds neither"):
        collect([tmp_path / "empty"])
    with pytest.raises(ReportError, match="no such file"):
        collect([tmp_path / "none"])
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(ReportError, match="neither results"):
        collect([tmp_path / "x.bin"])


REFERENCE = load_specs(
    """
[paper]
topic = "toy"
each = ["label"]
columns = [
  { name = "", value = "label" },
  { name = "scored by", value = "task.scored_by" },
  { name = "overall", value = "scores.overall", format = "point4" },
]
reference = [["theirs", "official scorer", 0.5876], ["nothing", "", ""]]
"""
)["paper"]


def test_rows_stand_in_the_order_of_their_values_and_those_without_one_last() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\neach = ['label']\norder = ['width', 'steps']\n" + QUALITY_COLUMNS)["q"]
    runs = [
        run(label, 0.5, width=width, steps=steps)
        for label, width, steps in (("c", 2, 10), ("d", None, 1), ("b", 1, 20), ("a", 1, 3))
    ]
    assert [row[0] for row in build(spec, runs).cells] == ["a", "b", "c", "d"]


def test_published_rows_stand_above_ours_and_never_alone() -> None:
    assert build(REFERENCE, []).cells == ()
    task = {"scored_by": "substitutes", "scorers": {"detector": "one"}, "substitutes": {"detector": "another"}}
    table = build(REFERENCE, [run("ours", 0.25, task=task)])
    assert table.cells == (
        ("theirs", "official scorer", "0.5876"),
        ("nothing", "–", "–"),
        ("ours", "substitutes", "0.2500"),
    )
    # A substitute's number is never without this.
    assert "Substitute scorers, so not the suite's official metric: detector: one for another." in markdown(table)


def test_a_published_row_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ReportError, match="a reference row needs a value for each of the 1 columns"):
        load_specs('[t]\ntopic = "x"\ncolumns = [{ name = "a", value = "b" }]\nreference = [["a", 1]]\n')


def test_the_papers_tables_hold_its_numbers() -> None:
    """Averages in the paper are of its own columns: each row's columns say its overall score again."""
    specs = load_specs()
    for name, digits in (("geneval", 0.0101), ("t2i-compbench", 0.0004)):
        spec = specs[name]
        first = [c.name for c in spec.columns].index("overall" if name == "geneval" else "average")
        for row in spec.reference:
            mean, parts = row[first], row[first + 1 : -1]
            assert len(parts) == {"geneval": 6, "t2i-compbench": 8}[name]
            assert abs(sum(parts) / len(parts) - mean) < digits


def scored(label: str, value: float, model: str, teacher: str | None, version: int) -> dict:
    found = run(label, value, task={"name": "toy", "version": version}, model={"name": label, "hash": model})
    return {**found, "against": {"model": {"name": "t", "hash": teacher}}} if teacher else found


def test_a_table_of_what_is_current_has_one_version_and_one_teacher() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\ncurrent = true\neach = ['label']\n" + QUALITY_COLUMNS)["q"]
    old = [
        scored("teacher", 0.9, "t1", None, 1),
        scored("best", 0.5, "s1", "t1", 1),
        scored("absmean", 0.1, "s2", "t1", 1),
    ]
    assert [c[0] for c in build(spec, old).cells] == ["teacher", "best", "absmean"]
    # A run of the new version alone: the old rows, teacher's included, drop out; nothing is mixed.
    one = [*old, scored("best", 0.6, "s3", "t2", 2)]
    assert [c[:2] for c in build(spec, one).cells] == [("best", "0.600")]
    # With its teacher, and with an older one's student, and an old student measured again.
    more = [
        scored("teacher", 0.8, "t2", None, 2),
        scored("fast", 0.2, "s4", "t0", 2),
        scored("absmean", 0.3, "s2", "t2", 2),
    ]
    assert [c[:2] for c in build(spec, [*one, *more]).cells] == [
        ("best", "0.600"),
        ("teacher", "0.800"),
        ("absmean", "0.300"),
    ]
    assert build(spec, [run("teacher", 0.9)]).cells == (("teacher", "0.900"),)
    assert build(spec, []).cells == ()


def test_a_table_over_all_teachers_still_has_one_version_of_the_suite() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\ncurrent = 'suite'\neach = ['label']\n" + QUALITY_COLUMNS)["q"]
    runs = [
        scored("old", 0.1, "s0", "t0", 1),
        scored("plain", 0.6, "s1", "t1", 2),
        scored("twin", 0.5, "s2", "t2", 2),
    ]
    assert [c[0] for c in build(spec, runs).cells] == ["plain", "twin"]


def test_a_teachers_run_on_other_prompts_than_its_students_stands_beside_nothing() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\ncurrent = true\neach = ['label']\n" + QUALITY_COLUMNS)["q"]
    few, many = ({"hash": h, "samples": n, "base_seed": 0, "count": 8} for h, n in (("p", 1), ("q", 4)))
    own = [
        {**scored("teacher", 0.9, "t", None, 1), "prompts": few},
        {**scored("teacher", 0.8, "t", None, 1), "prompts": many},
    ]
    assert [c[:2] for c in build(spec, own).cells] == [("teacher", "0.800")]
    student = {**scored("best", 0.5, "s", "t", 1), "prompts": few}
    assert [c[:2] for c in build(spec, [*own, student]).cells] == [("teacher", "0.900"), ("best", "0.500")]


def test_a_table_of_others_is_of_the_newest_teacher_that_they_were_measured_against() -> None:
    text = "[q]\ntopic = 'toy'\ncurrent = 'others'\nhas = 'quantizer'\neach = ['label']\n" + QUALITY_COLUMNS
    spec = load_specs(text)["q"]

    def by(name: str, row: dict) -> dict:
        return {**row, "quantizer": {"name": name}}

    older = [
        scored("teacher", 0.9, "t1", None, 1),
        by("tritflow", scored("best", 0.5, "s1", "t1", 1)),
        by("nf4", scored("NF4", 0.7, "s2", "t1", 1)),
    ]
    newer = [scored("teacher", 0.95, "t2", None, 1), by("tritflow", scored("best", 0.6, "s3", "t2", 1))]
    # Rivals were not measured against the newer teacher yet: theirs, and ours of then.
    assert [c[:2] for c in build(spec, [*older, *newer]).cells] == [("best", "0.500"), ("NF4", "0.700")]
    then = by("nf4", scored("NF4", 0.8, "s4", "t2", 1))
    assert [c[:2] for c in build(spec, [*older, *newer, then]).cells] == [("best", "0.600"), ("NF4", "0.800")]
    # Without any, as in other tables.
    assert [c[:2] for c in build(spec, newer).cells] == [("best", "0.600")]


def test_a_table_of_the_teacher_is_its_run_of_most_pictures() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\ncurrent = 'teacher'\n" + QUALITY_COLUMNS)["q"]
    few, many = (
        {"hash": h, "samples": n, "base_seed": 0, "count": 8, "pictures": 8 * n} for h, n in (("p", 1), ("q", 4))
    )
    runs = [
        {**scored("teacher", 0.7, "older", None, 1), "prompts": many | {"pictures": 99}},
        {**scored("teacher", 0.8, "t", None, 1), "prompts": many},
        {**scored("teacher", 0.9, "t", None, 1), "prompts": few},
        {**scored("best", 0.5, "s", "t", 1), "prompts": few},
    ]
    assert [c[:2] for c in build(spec, runs).cells] == [("teacher", "0.800")]


def test_a_row_is_the_newest_models_run_of_most_pictures() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\neach = ['label']\n" + QUALITY_COLUMNS)["q"]
    rows = load_specs("[q]\ntopic = 'toy'\nrows = [{label = 'best'}]\n" + QUALITY_COLUMNS)["q"]

    def drawn(run: dict, pictures: int) -> dict:
        return {**run, "prompts": {"pictures": pictures}}

    runs = [
        drawn(scored("best", 0.1, "older", "t", 1), 99),
        drawn(scored("best", 0.2, "s", "t", 1), 8),
        drawn(scored("best", 0.3, "s", "t", 1), 8),
        drawn(scored("best", 0.4, "s", "other", 1), 50),
        drawn(scored("best", 0.5, "s", "t", 1), 4),
    ]
    for one in (spec, rows):
        assert [c[:2] for c in build(one, runs).cells] == [("best", "0.300")]
    assert [c[:2] for c in build(spec, [*runs, scored("best", 0.6, "newer", "t", 1)]).cells] == [("best", "0.600")]


def test_a_table_of_the_student_is_of_what_was_measured_against_its_newest_run() -> None:
    spec = load_specs("[q]\ntopic = 'toy'\ncurrent = 'student'\nrows = [{label = 'off'}]\n" + QUALITY_COLUMNS)["q"]
    runs = [scored("teacher", 0.9, "t", None, 1), scored("best", 0.4, "s1", "t", 1), scored("off", 0.3, "s1", "s1", 1)]
    assert [c[:2] for c in build(spec, runs).cells] == [("off", "0.300")]
    newer = [*runs, scored("best", 0.5, "s2", "t", 1)]
    assert not build(spec, newer).cells  # of another student
    again = [*newer, scored("off", 0.6, "s2", "s2", 1), scored("off", 0.2, "s1", "s1", 1)]
    assert [c[:2] for c in build(spec, again).cells] == [("off", "0.600")]


def test_the_packages_tables_of_scenes_are_of_what_is_current() -> None:
    assert all(s.current for s in load_specs().values() if s.topic == "scenes")


def test_a_table_like_another_says_only_what_is_its_own() -> None:
    text = (
        "[a]\ntopic = 'toy'\nnote = 'n'\n"
        + QUALITY_COLUMNS
        + "\n[b]\nlike = 'a'\nnote = 'm'\n[c]\nlike = 'b'\nhas = 'x'\n"
    )
    specs = load_specs(text)
    assert specs["b"] == dataclasses.replace(specs["a"], name="b", note="m")
    assert specs["c"] == dataclasses.replace(specs["b"], name="c", has="x")
