"""Report folders, the gallery page, figures and the two commands."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation.images import ImageSet
from tritflow.report import figures
from tritflow.report.build import write_curve, write_report
from tritflow.report.gallery import write_gallery
from tritflow.report.sources import ReportError, Sources, collect
from tritflow.results import append


class Page(HTMLParser):
    """Elements and their attributes; raises nothing, so unclosed tags are counted here."""

    VOID = frozenset({"meta", "img", "input", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture
def gallery(evaluated: Path, tmp_path: Path) -> Path:
    sets = {s.model.name: s for s in collect([evaluated]).image_sets()}
    return write_gallery(tmp_path / "page", sets["teacher"], sets["student <b>"])


def test_gallery_is_whole_offline_and_sorted(gallery: Path) -> None:
    text = gallery.read_text()
    page = Page(text)
    assert page.open == []
    cards = page.all("article")
    assert len(cards) == 24
    psnr = [float(str(c["data-psnr"])) for c in cards]
    assert psnr == sorted(psnr)
    pictures = page.all("img")
    assert len(pictures) == 48
    for picture in pictures:
        Image.open(gallery.parent / str(picture["src"])).verify()
        assert picture["alt"]
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    assert not page.all("link")


def test_gallery_escapes_and_can_be_used_from_the_keyboard(gallery: Path) -> None:
    text = gallery.read_text()
    assert "<b>" not in text
    assert "student &lt;b&gt;" in text
    page = Page(text)
    ranges = [i for i in page.all("input") if i["type"] == "range"]
    assert len(ranges) == 24 + 2  # a slider a card, all sliders, size
    labelled = [i for i in ranges if i.get("aria-label")]
    assert len(labelled) == 24
    assert not any("tabindex" in attrs for _, attrs in page.elements)
    assert "prefers-color-scheme: dark" in text


def test_gallery_keeps_the_most_different(evaluated: Path, tmp_path: Path) -> None:
    sets = {s.model.name: s for s in collect([evaluated]).image_sets()}
    whole = Page(write_gallery(tmp_path / "a", sets["teacher"], sets["student <b>"]).read_text()).all("article")
    page = write_gallery(tmp_path / "b", sets["teacher"], sets["student <b>"], limit=5)
    assert Page(page.read_text()).all("article") == whole[:5]
    assert "5 pairs of 24 that differ most" in page.read_text()
    assert len(list((tmp_path / "b" / "images").rglob("*.png"))) == 10


def test_report_folder(evaluated: Path, tmp_path: Path) -> None:
    written = write_report(collect([evaluated]), tmp_path)
    names = {p.relative_to(tmp_path).as_posix() for p in written}
    gallery = "gallery/student-b-ssssssss-w2a16/index.html"
    assert names == {"report.md", "toy-scores.svg", "toy-bands.svg", "grid.png", gallery}
    text = (tmp_path / "report.md").read_text()
    for name in names - {"report.md"}:
        assert f"({name})" in text
    page = (tmp_path / gallery).read_text()
    assert 'data-changed="lost"' in page  # verdicts of both models were found
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 2 * 192


def test_figures_are_the_same_bytes_again(evaluated: Path) -> None:
    runs = collect([evaluated]).runs["toy"]
    first = figures.encode(figures.tag_scores(runs))
    assert first == figures.encode(figures.tag_scores(runs))
    assert first.startswith(b"<?xml")
    assert b"<dc:date>" not in first
    assert figures.encode(figures.band_detail(runs), "png").startswith(b"\x89PNG")
    with pytest.raises(ReportError, match="no run holds fidelity"):
        figures.band_detail(runs[:1])


def test_nothing_to_report(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="nothing to report"):
        write_report(Sources(), tmp_path)


def test_report_command_updates_and_checks(evaluated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "a.md"
    page.write_text("<!-- table:quality -->\n<!-- /table -->\n")
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    # The toy suite's runs under the scenes topic, where the package's own table looks for them.
    data = json.loads((evaluated / "results.json").read_text())
    (results / "scenes-x.json").write_text(json.dumps({**data, "topic": "scenes"}))
    run = CliRunner().invoke
    assert run(app, ["report", "--check"]).exit_code == 1
    done = run(app, ["report", "--update", "docs"])
    assert done.exit_code == 0, done.output
    assert "| absmean |" in page.read_text()
    assert run(app, ["report", "--check"]).exit_code == 0
    page.write_text(page.read_text().replace("| absmean |", "| better |"))
    stale = run(app, ["report", "--check", "docs"])
    assert stale.exit_code == 1
    assert "docs/a.md" in stale.output
    shown = run(app, ["report"])
    assert "## Ternary FLUX against its teacher" in shown.output


def test_the_repositorys_own_results_make_a_report(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    written = write_report(collect([results]), tmp_path / "out")
    names = {path.name for path in written}
    assert {"report.md", "scenes-scores.svg", "scenes-rivals.svg"} <= names
    # Timings are "against" something, too, and draw no pictures.
    assert "dense bf16" in (tmp_path / "out" / "report.md").read_text()


def test_report_command_without_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    bare = CliRunner().invoke(app, ["report"])
    assert bare.exit_code == 2
    assert "no results were given" in bare.output


def test_a_damaged_picture_set_is_named(evaluated: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(evaluated, copy)
    victim = next((copy / "teacher-tttttttt-w2a16").rglob("*.png"))
    victim.unlink()
    with pytest.raises(ValueError, match=re.escape(str(victim))):
        write_report(collect([copy]), tmp_path / "out")
    assert isinstance(ImageSet.open(evaluated / victim.relative_to(copy).parts[0]), ImageSet)


def test_a_second_seed_set_is_no_student(tmp_path: Path) -> None:
    """Its pictures come from other noise, so they are neither laid over the teacher's nor put in the grid."""
    from evaluation_fakes import SETTINGS, ToyTask, draw

    from tritflow.evaluation.images import ModelId
    from tritflow.evaluation.run import Contender, Plan, Sampling, evaluate
    from tritflow.results import append

    task = ToyTask()
    model = Contender(ModelId("one", "oooooooo"), SETTINGS, lambda: draw)
    other = Contender(ModelId("two", "tttttttt"), SETTINGS, lambda: draw)
    records = task.prompts(per_tag=2)
    run = evaluate(task, records, model, tmp_path, teacher=other, sampling=Sampling(2), plan=Plan(noise_seed=4))
    append(tmp_path / "results.json", "toy", run)
    written = write_report(collect([tmp_path]), tmp_path / "report")
    pages = [p.parent.name for p in written if p.name == "index.html"]
    assert pages == ["one-oooooooo-w2a16"]


def test_two_suites_in_one_report(evaluated: Path, tmp_path: Path) -> None:
    """Each has its own grid and its own galleries, though the folders have the same names."""
    from evaluation_fakes import SETTINGS, ToyTask, draw

    from tritflow.evaluation.images import ModelId
    from tritflow.evaluation.run import Contender, Sampling, evaluate
    from tritflow.results import append

    class Other(ToyTask):
        name = "other"

    task = Other()
    teacher = Contender(ModelId("teacher", "tttttttt"), SETTINGS, lambda: draw)
    student = Contender(ModelId("student <b>", "ssssssss"), SETTINGS, lambda: draw)
    run = evaluate(task, task.prompts(per_tag=2), student, tmp_path / "o", teacher=teacher, sampling=Sampling(2))
    append(tmp_path / "o" / "results.json", "other", run)
    written = write_report(collect([evaluated, tmp_path / "o"]), tmp_path / "report")
    names = {p.relative_to(tmp_path / "report").as_posix() for p in written}
    assert {"grid-toy.png", "grid-other.png"} <= names
    pages = {n for n in names if n.endswith("index.html")}
    assert pages == {
        "gallery/toy-student-b-ssssssss-w2a16/index.html",
        "gallery/other-student-b-ssssssss-w2a16/index.html",
    }


def test_a_training_run_is_drawn_as_a_curve(tmp_path: Path) -> None:
    point = {"single_object": 0.5, "position": 0.1, "overall": 0.3}
    curve = [{"steps": 100.0 * i, "seconds": 60.0 * i} | {k: v * i for k, v in point.items()} for i in (1, 2)]
    run = {"label": "small FLUX", "prompts_per_tag": 8, "curve": curve, "device": "GPU"}
    append(tmp_path / "results" / "training-gpu.json", "training", run)
    sources = collect([tmp_path / "results"])
    axes = figures.training_curve(sources.runs["training"]).axes[0]
    drawn = {str(line.get_label()): list(line.get_ydata()) for line in axes.lines}
    assert drawn["position"] == [0.1, 0.2]
    assert list(axes.lines[-2].get_xdata()) == [1, 2]
    written = write_report(sources, tmp_path / "report")
    assert "training-curve.svg" in [p.name for p in written]
    with pytest.raises(ReportError, match="no curve"):
        figures.training_curve([{"label": "x", "curve": []}])


def test_legs_of_one_training_follow_each_other(tmp_path: Path) -> None:
    def leg(prompts: int, *points: tuple[float | None, float]) -> dict[str, object]:
        curve = [({} if s is None else {"seconds": s}) | {"counting": v, "overall": v} for s, v in points]
        return {"label": "small FLUX", "prompts_per_tag": prompts, "curve": curve}

    runs = [leg(8, (60, 0.9)), leg(48, (60, 0.1), (120, 0.2)), leg(32, (60, 0.8), (None, 0.9))]
    legs = figures.training_legs(runs)
    assert legs == runs[1:]
    axes = figures.training_curve(legs).axes[0]
    counted = [line for line in axes.lines if line.get_color() == "#0072B2"]
    assert [list(map(float, line.get_xdata())) for line in counted] == [[1, 2], [3]]
    assert next(line.get_label() for line in counted) == "counting"
    assert {t.get_text() for t in axes.texts} == {"leg 1", "leg 2"}
    assert "32 or 48 held-out" in axes.get_title(loc="left")
    assert figures.training_legs(runs[:1]) == runs[:1]


def test_the_curve_alone_is_written_in_the_kind_of_its_name(tmp_path: Path) -> None:
    run = {"label": "small FLUX", "prompts_per_tag": 8, "curve": [{"seconds": 60.0, "overall": 0.5}]}
    append(tmp_path / "results" / "training-gpu.json", "training", run)
    sources = collect([tmp_path / "results"])
    path = write_curve(sources, tmp_path / "curve.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.read_bytes() == write_curve(sources, tmp_path / "again.png").read_bytes()
    with pytest.raises(ReportError, match=r"\.svg or \.png"):
        write_curve(sources, tmp_path / "curve.pdf")
    with pytest.raises(ReportError, match="topic 'training'"):
        write_curve(collect([]), tmp_path / "none.png")
