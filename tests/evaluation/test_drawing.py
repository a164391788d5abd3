"""Picture folders: resumed runs equal unbroken ones, and everything foreign is refused by name."""

from __future__ import annotations

import dataclasses
import json
import random
import signal
from pathlib import Path

import pytest
from evaluation_fakes import MODEL, SETTINGS, ToyTask, draw, draw_set, folder_bytes, noise_picture

import forked
from tritflow.evaluation.api import EvaluationError, Judgement
from tritflow.evaluation.drawing import draw_images, seed_of
from tritflow.evaluation.images import ImageSet, ImageSetError, ModelId, read_verdicts
from tritflow.evaluation.projection import project

KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import tritflow.evaluation.drawing as drawing
from evaluation_fakes import draw_set
left = [int(sys.argv[2])]
real = os.replace
def replace(a, b):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(a, b)
os.replace = replace
draw_set(sys.argv[1])
"""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    draw_set(tmp_path / "whole")
    return tmp_path / "whole"


def test_manifest_accounts_for_every_picture(whole: Path) -> None:
    images = ImageSet.open(whole, ToyTask())
    assert len(images.entries) == 3 * 3 * 2
    first = images.entries[0]
    assert first["prompt"] == "a light picture, number 0"
    assert first["seed"] == seed_of(0, "light-0", 0)
    assert (first["model"], first["model_hash"], first["height"]) == ("fake", "aaaa", 16)
    assert len({e["seed"] for e in images.entries}) == 18
    for (entry, pixels), batch in zip(images.pixels(), [i // 4 for i in range(18)], strict=True):
        seeds = [e["seed"] for e in images.entries[4 * batch : 4 * batch + 4]]
        assert (pixels == draw([""] * len(seeds), seeds)[seeds.index(entry["seed"])]).all()


@pytest.mark.parametrize("run", range(4))
def test_killed_and_resumed_equals_unbroken(run: int, whole: Path, tmp_path: Path) -> None:
    """SIGKILL before a random rename (meta.json, a picture, the manifest), twice, then a run to the end."""
    rng = random.Random(run)
    folder = tmp_path / "killed"
    for _ in range(2):
        command = ["-c", KILLED, folder, rng.randrange(1, 14), Path(__file__).parent]
        assert forked.run(command, timeout=60).poll() == -signal.SIGKILL
    draw_set(folder)
    assert folder_bytes(folder) == folder_bytes(whole)


def test_half_written_manifest_line_and_stray_files_are_mended(whole: Path) -> None:
    before = folder_bytes(whole)
    manifest = whole / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-30])
    (whole / "images" / ".x.png.123.tmp").write_bytes(b"half")
    draw_set(whole)
    assert folder_bytes(whole) == before


def test_only_batches_with_a_gap_are_drawn_again(whole: Path) -> None:
    before = folder_bytes(whole)
    images = ImageSet.open(whole)
    (whole / images.entries[5]["path"]).unlink()
    short = whole / images.entries[10]["path"]
    short.write_bytes(short.read_bytes()[:50])
    calls = []

    def counting(prompts: list[str], seeds: list[int]) -> list:
        calls.append(len(seeds))
        return draw(prompts, seeds)

    draw_set(whole, draw=counting)
    assert calls == [4, 4]
    assert folder_bytes(whole) == before


def test_a_finished_folder_never_asks_for_the_model(whole: Path) -> None:
    def load():  # type: ignore[no-untyped-def]
        raise AssertionError("loaded")

    assert draw_set(whole, draw=load, lazy=True) is not None


def test_two_ranks_make_the_folder_of_one(whole: Path, tmp_path: Path) -> None:
    assert draw_set(tmp_path / "ranks", shard=(1, 2)) is None
    assert draw_set(tmp_path / "ranks", shard=(0, 2)) is not None
    assert folder_bytes(tmp_path / "ranks") == folder_bytes(whole)


def test_seeds_do_not_depend_on_the_selection() -> None:
    assert seed_of(0, "light-0", 1) == seed_of(0, "light-0", 1)
    assert len({seed_of(b, p, s) for b in range(2) for p in "ab" for s in range(3)}) == 12


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": ModelId("fake", "bbbb")}, "another model"),
        ({"settings": dataclasses.replace(SETTINGS, guidance_scale=2.0)}, "another settings"),
        ({"base_seed": 1}, "another base seed"),
        ({"batch_size": 8}, "another batch size"),
        ({"per_tag": 2}, "another prompts hash"),
        ({"device": "cuda"}, "another device"),
        ({"versions": {"torch": "3"}}, "another versions"),
    ],
)
def test_drawing_on_with_other_settings_is_refused(whole: Path, change: dict, words: str) -> None:
    with pytest.raises(ImageSetError, match=words):
        draw_set(whole, **change)


def test_another_suites_folder_is_refused(whole: Path) -> None:
    class Other(ToyTask):
        name = "other"

    with pytest.raises(ImageSetError, match="suite 'toy', not of 'other'"):
        ImageSet.open(whole, Other())
    task = Other()
    with pytest.raises(ImageSetError, match=r"another suite \(toy 1, now other 1\)"):
        draw_images(whole, task, task.prompts(per_tag=3), draw, MODEL, SETTINGS, samples=2, batch_size=4)


def test_another_versions_folder_is_refused(whole: Path) -> None:
    """A suite's version is raised when its prompts change; pictures of the old ones are not the new suite's."""

    class Newer(ToyTask):
        version = 2

    with pytest.raises(ImageSetError, match="version 1 of 'toy', here it is version 2"):
        ImageSet.open(whole, Newer())
    task = Newer()
    with pytest.raises(ImageSetError, match=r"another suite \(toy 1, now toy 2\)"):
        draw_images(whole, task, task.prompts(per_tag=3), draw, MODEL, SETTINGS, samples=2, batch_size=4)


def edit(folder: Path, index: int, **values: object) -> None:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    lines[index].update(values)
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_mixed_models_missing_seeds_and_strangers_are_refused(whole: Path) -> None:
    before = (whole / "manifest.jsonl").read_bytes()
    for values, words in (
        ({"model_hash": "cccc"}, r"light-0/0001.png.*'fake' \(cccc\).*one model"),
        ({"seed": None}, r"line 2 \(images/light-0/0001.png\) has 'seed' null.*no seed does not compare"),
        ({"prompt_id": "who"}, "'who' is not in prompts.jsonl"),
    ):
        edit(whole, 1, **values)
        with pytest.raises(ImageSetError, match=words):
            ImageSet.open(whole)
        (whole / "manifest.jsonl").write_bytes(before)


@pytest.mark.parametrize(
    "key", ["path", "prompt_id", "sample", "seed", "model", "model_hash", "tag", "prompt", "height", "bytes", "sha256"]
)
def test_a_manifest_line_that_lacks_something_is_refused_by_name(whole: Path, key: str) -> None:
    manifest = whole / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    del lines[4][key]
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = rf"manifest.jsonl: line 5 \(.*\) has no '{key}'"
    with pytest.raises(ImageSetError, match=words):
        ImageSet.open(whole)
    with pytest.raises(ImageSetError, match=words):  # drawing on looks at the same lines
        draw_set(whole)
    with pytest.raises(ImageSetError, match=words):
        project(whole, "fake", 18, SETTINGS)


def test_lines_and_meta_of_another_kind_are_refused_by_name(whole: Path) -> None:
    for name, content, words in (
        ("manifest.jsonl", b"[1]\n", "manifest.jsonl: line 1 is no JSON object"),
        ("prompts.jsonl", b'{"id":"a"}\n', "prompts.jsonl: line 1 has no 'tag'"),
    ):
        before = (whole / name).read_bytes()
        (whole / name).write_bytes(content)
        with pytest.raises(ImageSetError, match=words):
            ImageSet.open(whole)
        (whole / name).write_bytes(before)
    meta = json.loads((whole / "meta.json").read_text())
    for changed, words in (
        ({k: v for k, v in meta.items() if k != "samples"}, "meta.json: has no 'samples'"),
        ({**meta, "model": {"name": "fake"}}, "meta.json: model has no 'hash'"),
    ):
        (whole / "meta.json").write_text(json.dumps(changed))
        with pytest.raises(ImageSetError, match=words):
            ImageSet.open(whole)


def test_verdicts_without_seeds_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "a.scores.jsonl"
    good = {"prompt_id": "a", "tag": "light", "sample": 0, "seed": 3, "score": 1, "reason": ""}
    path.write_text(json.dumps(good) + "\n")
    assert read_verdicts(path) == [Judgement("a", "light", 0, 3, 1)]
    for key in good:
        bad = {k: v for k, v in good.items() if k != key}
        path.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
        with pytest.raises(ImageSetError, match=rf"a.scores.jsonl: line 2 has no '{key}'"):
            read_verdicts(path)
    path.write_text(json.dumps({**good, "seed": "3"}) + "\n")
    with pytest.raises(ImageSetError, match="line 1 has 'seed' \"3\", where a whole number belongs; what has no seed"):
        read_verdicts(path)


def test_missing_and_half_written_pictures_are_refused(whole: Path) -> None:
    path = whole / "images" / "dark-1" / "0000.png"
    data = path.read_bytes()
    path.write_bytes(data[:-20])
    with pytest.raises(ImageSetError, match=r"dark-1/0000.png: is half-written"):
        ImageSet.open(whole)
    path.write_bytes(data[:-20] + bytes(20))  # the right length, the wrong content
    with pytest.raises(ImageSetError, match=r"dark-1/0000.png.*SHA-256"):
        list(ImageSet.open(whole).pixels())
    path.unlink()
    with pytest.raises(ImageSetError, match=r"dark-1/0000.png: is missing"):
        ImageSet.open(whole)
    lines = (whole / "manifest.jsonl").read_text().splitlines(keepends=True)
    (whole / "manifest.jsonl").write_text("".join(line for line in lines if "dark-1/0000" not in line))
    with pytest.raises(ImageSetError, match="17 of 18 pictures, the first missing one is of prompt 'dark-1'"):
        ImageSet.open(whole)


def test_folders_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ImageSetError, match="no such folder"):
        ImageSet.open(tmp_path / "nowhere")
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(ImageSetError, match=r"has no meta\.json"):
        ImageSet.open(tmp_path)
    with pytest.raises(ImageSetError, match="not empty"):
        draw_set(tmp_path)


def test_a_pipeline_that_miscounts_or_missizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="3 pictures for 4"):
        draw_set(tmp_path / "a", draw=lambda p, s: draw(p, s)[:-1])
    with pytest.raises(EvaluationError, match="24x24 pixels, asked for 16x16"):
        draw_set(tmp_path / "b", draw=lambda p, s: [noise_picture(i, 24) for i in s])


def test_pairs_want_the_same_noise(whole: Path, tmp_path: Path) -> None:
    mine = ImageSet.open(whole)
    other = draw_set(tmp_path / "other", model=ModelId("other", "dddd"))
    assert other is not None
    assert [a["path"] for a, _ in mine.pairs(other)] == [b["path"] for _, b in mine.pairs(other)]
    seeds = draw_set(tmp_path / "seeds", base_seed=5)
    assert seeds is not None
    with pytest.raises(ImageSetError, match="different seeds"):
        mine.pairs(seeds)
    fewer = draw_set(tmp_path / "fewer", per_tag=2)
    assert fewer is not None
    with pytest.raises(ImageSetError, match="different prompts"):
        mine.pairs(fewer)


def test_a_file_name_may_not_leave_the_folder(whole: Path) -> None:
    edit(whole, 0, path="../../secret.png")
    with pytest.raises(ImageSetError, match="outside"):
        ImageSet.open(whole)
