"""`bench suites`: its meters, its account of a whole suite, and the plan of all 24,000 pictures without drawing any."""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from pathlib import Path

import pytest
from evaluation_fakes import ToyTask
from PIL import Image
from suite_fakes import MODEL, SETTINGS
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation import overhead
from tritflow.evaluation.api import TaskOptions, get_task
from tritflow.evaluation.drawing import FileSink, encode_png, plan, seed_of, write_png
from tritflow.report.tables import build, load_specs, markdown
from tritflow.results import read

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_files = pytest.mark.skipif(not SHARED.is_dir(), reason="the suites' own files are not at hand")


def burn(seconds: float) -> None:
    """Processor time, and not just time, of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


class SlowSink:
    def __init__(self) -> None:
        self.data = b""

    def write(self, data: bytes, /) -> int:
        burn(0.01)
        self.data += data
        return len(data)


def test_the_encoding_meter_leaves_out_what_the_sink_does() -> None:
    """Hashing and writing happen inside the encoder's call, and must not hide in the time of encoding."""

    def encode(picture: Image.Image, sink: overhead.Sink) -> None:
        burn(0.03)
        for piece in (b"a", b"bc", b"d"):
            sink.write(piece)
        time.sleep(0.05)  # waiting is no processor time

    meter, sink = overhead.EncodingMeter(encode), SlowSink()
    for _ in range(2):
        meter(Image.new("RGB", (1, 1)), sink)
    assert sink.data == b"abcdabcd"
    assert meter.processor == pytest.approx(0.06, abs=0.02)
    assert meter.sink_processor == pytest.approx(0.06, abs=0.02)
    assert meter.wall > 0.06 + 0.1 - 0.02


def test_the_drawing_meter_tells_work_from_waiting() -> None:
    def work() -> str:
        burn(0.03)
        time.sleep(0.05)
        return "drawn"

    meter = overhead.DrawingMeter(work)
    assert meter() == "drawn"
    assert meter.processor == pytest.approx(0.03, abs=0.02)
    assert meter.wall > 0.075


def test_what_is_beyond_is_everything_that_no_meter_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """Work put into the sink, into the manifest and into the seeds counts; work put into encoding does not."""

    def beyond() -> dict[str, float]:
        found: dict[str, float] = overhead.measure(task=ToyTask(), size=16, samples=2, batch_size=4)["milliseconds"]
        return found

    before = beyond()
    real_write = FileSink.write

    def slow_write(self: FileSink, data: bytes, /) -> int:
        burn(0.001)
        return real_write(self, data)

    monkeypatch.setattr(FileSink, "write", slow_write)
    pieces: list[int] = []
    encode_to = type("Counting", (), {"write": lambda self, data: pieces.append(len(data)) or len(data)})()
    write_png(overhead.detailed_pictures(1, 16)[0], encode_to)
    slow = beyond()
    assert slow["sink"] - before["sink"] == pytest.approx(len(pieces), rel=0.5)
    assert slow["beyond"] - before["beyond"] > 0.7 * len(pieces)
    monkeypatch.setattr(FileSink, "write", real_write)

    def slow_png(picture: Image.Image, sink: overhead.Sink) -> None:
        burn(0.02)
        write_png(picture, sink)

    monkeypatch.setattr(overhead.EncodingMeter.__init__, "__defaults__", (slow_png,))
    encoding = beyond()
    assert encoding["encoding"] > 20
    assert encoding["beyond"] < before["beyond"] + 5


def test_paces_are_of_whole_batches() -> None:
    clock = iter([1.0, 2.0, 2.5, 4.5])
    paces = overhead._Paces(lambda: next(clock))
    for done in (0, 4, 4, 8, 12):  # the last batch is told of twice
        paces.note(done)
    assert paces.quantiles() == {
        "p20": pytest.approx(175),
        "p50": pytest.approx(250),
        "p80": pytest.approx(400),
    }
    assert overhead._Paces(lambda: 0.0).quantiles() is None


def test_a_written_picture_is_the_encoded_one(tmp_path: Path) -> None:
    for mode in ("RGB", "RGBA", "L"):
        picture = overhead.detailed_pictures(1, 40)[0].convert(mode)
        sink = FileSink(tmp_path / "a.png")
        write_png(picture, sink)
        sha256 = sink.close()
        data = (tmp_path / "a.png").read_bytes()
        assert data == encode_png(picture)
        assert sink.size == len(data)
        import hashlib

        assert sha256 == hashlib.sha256(data).hexdigest()
        with Image.open(io.BytesIO(data)) as again:
            assert again.mode == "RGB"
            assert again.tobytes() == picture.convert("RGB").tobytes()
            assert not again.info


@needs_files
def test_every_picture_of_geneval_is_accounted_for() -> None:
    """553 x 4 with a stand-in pipeline: 2,212 pictures, a seed each, under 3 ms a picture beside drawing and PNGs."""
    run = overhead.measure("geneval", prompts=SHARED, size=16)
    assert set(run["accounted"].values()) == {2212}
    assert run["pictures"] == 2212
    assert run["milliseconds"]["beyond"] < 3
    assert run["milliseconds"]["beyond_by_batch"]["p50"] < 3


@needs_files
@pytest.mark.parametrize(
    ("suite", "each", "total"),
    [
        ("geneval", {"single_object": 320, "two_object": 396, "counting": 320, "colors": 376}, 2212),
        ("t2i-compbench", dict.fromkeys(("color", "shape", "spatial", "complex"), 3000), 24_000),
    ],
)
def test_the_plan_accounts_for_every_picture(suite: str, each: dict[str, int], total: int) -> None:
    """The manifest as it will be, without drawing: places, seeds and (prompt, sample) pairs are all different."""
    task = get_task(suite, TaskOptions(prompts=SHARED))
    records = task.prompts()
    entries = plan(task, records, MODEL, SETTINGS, task.default_samples, 0)
    assert len(entries) == len(records) * task.default_samples == total
    for what in (lambda e: e["path"], lambda e: (e["prompt_id"], e["sample"])):
        assert len({what(e) for e in entries}) == total
    # Seeds have 31 bits: of 24,000 pictures some pair may share one by chance, of the same prompt none does.
    assert len({(e["prompt_id"], e["seed"]) for e in entries}) == total
    assert len({e["seed"] for e in entries}) >= total - 2
    assert all(e["seed"] == seed_of(0, e["prompt_id"], e["sample"]) for e in entries[:: total // 50])
    counted = Counter(e["tag"] for e in entries)
    assert sum(counted.values()) == total
    assert set(counted) == set(task.tags)
    assert {tag: counted[tag] for tag in each} == each
    assert all(entries[i]["sample"] == i % task.default_samples for i in range(total))


@needs_files
def test_the_command(tmp_path: Path) -> None:
    """`bench suites`: its words, its JSON, what it stores, and the table that is made of it."""
    arguments = ["bench", "suites", "geneval", "--prompts", str(SHARED), "--size", "16", "--seeds-per-prompt", "1"]
    words = CliRunner().invoke(app, arguments)
    assert words.exit_code == 0, words.output
    assert "geneval, 553 x 1, 16x16: 553 files, 553 lines, 553 seeds for 553 pictures" in words.stdout
    assert "beyond drawing and PNG encoding" in words.stdout
    stored = CliRunner().invoke(app, [*arguments, "--results", str(tmp_path), "--json", "--workdir", str(tmp_path)])
    assert stored.exit_code == 0, stored.output
    run = json.loads(stored.stdout)
    assert set(run["accounted"].values()) == {553}
    ms = run["milliseconds"]
    assert ms["all"] >= ms["beyond"] + ms["encoding"] + ms["drawing"] - 0.01
    assert ms["beyond"] > ms["sink"] > 0
    kept = read(next(tmp_path.glob("suites-*.json")), "suites")
    assert len(kept) == 1
    assert f"| geneval, 553 x 1, 16x16 | {run['device']} | 553 |" in markdown(build(load_specs()["suites"], kept))
    assert not list(tmp_path.glob("tritflow-suites-*"))
