"""`tritflow reproduce`: the whole way on the small FLUX, killed twice; the paper's suites on a tiny one; the plan."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_scorers
import torch
from evaluation_fakes import folder_bytes
from suite_fakes import small_suites
from typer.testing import CliRunner

import forked
from tritflow.cli.main import app
from tritflow.evaluation.scorers import dpt_depth, llava_judge, mask2former
from tritflow.results import read

RECIPE = """
summary = "seconds on one core"
ternarizer = "mse"

[calibration]
num_prompts = 4
num_inference_steps = 2
guidance_scales = [3.0]
batch_size = 2

[distillation]
steps = 6
batch_size = 2
warmup_steps = 1
checkpoint_every = 2
"""


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def small(recipe: Path, out: Path) -> list[str]:
    counts = ["--limit", "2", "--samples", "2", "--steps", "2", "--rounds", "1", "--batch-size", "1"]
    return ["small", *counts, "--no-kernel-off", "--recipe", str(recipe), "--device", "cpu", "--out", str(out), "--yes"]


def killed_when(ready: Callable[[], bool], arguments: list[str]) -> None:
    """Start the command in a process of its own and kill it as soon as `ready`."""
    threads = str(torch.get_num_threads())  # sums in another order have other last digits
    process = forked.start(
        ["-m", "tritflow.cli.main", "reproduce", *arguments], {**os.environ, "OMP_NUM_THREADS": threads}
    )
    deadline = time.monotonic() + 120
    while not ready() and time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"ended before it could be killed: {process.stderr}")
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_the_whole_way_on_the_small_flux_killed_twice(tmp_path: Path) -> None:
    recipe = tmp_path / "seconds.toml"
    recipe.write_text(RECIPE)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = invoke(*small(recipe, whole))
    assert done.exit_code == 0, done.output

    def stage(name: str) -> dict[str, Any]:
        data: dict[str, Any] = json.loads((broken / "stages" / f"{name}.json").read_text())
        return data

    work = broken / "small-1.58bit" / ".work"
    killed_when(lambda: any(work.rglob("shard-*.safetensors")), small(recipe, broken))
    assert stage("quantize")["outputs"] is None
    assert not (broken / "pictures").exists()
    killed_when(
        lambda: any(p.stat().st_size for p in broken.glob("pictures/*/small-1-58bit*/manifest.jsonl")),
        small(recipe, broken),
    )
    assert stage("quantize")["outputs"] is not None
    assert stage("draw-scenes-teacher")["outputs"] is not None
    assert stage("draw-scenes-student")["outputs"] is None
    finished = invoke(*small(recipe, broken))
    assert finished.exit_code == 0, finished.output
    lines = [line for line in finished.stderr.splitlines() if "│" not in line]
    assert "drawing scenes with 1.58-bit (goes on)" in lines
    assert not any(line.startswith(("quantizing", "drawing scenes with teacher")) for line in lines)

    for name in ("pictures", "small-1.58bit/transformer"):
        assert folder_bytes(broken / name) == folder_bytes(whole / name)
    assert (broken / "prompts.jsonl").read_bytes() == (whole / "prompts.jsonl").read_bytes()
    assert (broken / "report/grid.png").read_bytes() == (whole / "report/grid.png").read_bytes()
    cost = read(broken / "results" / "cost.json", "cost")[-1]
    assert cost["end_to_end"]["optimized"]["optimized"]
    assert min(cost["latency"].values()) > 0
    assert cost["storage"]["ratio"] > 5
    runs = [read(folder / "results" / "scenes-student.json")[-1] for folder in (whole, broken)]
    for key in ("scores", "paired", "fidelity", "pictures", "prompts", "model"):
        assert runs[0][key] == runs[1][key]
    assert "storage 27.23 MB -> " in finished.stdout
    assert finished.stdout.strip().endswith("report.md")
    page = (broken / "report" / "report.md").read_text()
    assert "## Latency, memory and storage" in page
    assert "| A100-80G (paper) | FLUX.1-dev | 50 | 26.40 | 25.00 |" in page
    assert len(list((broken / "report" / "gallery").glob("*/index.html"))) == 1
    # Nothing is left to do, and a lost picture alone is drawn again.
    again = invoke(*small(recipe, broken))
    assert "everything is done" in again.stderr
    drawn = broken.glob("pictures/*/small-*/images/*/0001.png")
    next(p for p in drawn if "1-58bit" not in str(p)).unlink()
    mended = invoke(*small(recipe, broken), "--json")
    assert mended.exit_code == 0, mended.output
    assert "drawing scenes with teacher (again: what it had left was changed or removed)" in mended.stderr
    assert "scoring" not in mended.stderr  # the very same picture came back
    assert folder_bytes(broken / "pictures") == folder_bytes(whole / "pictures")
    assert json.loads(mended.stdout)["scores"][1]["model"] == "1.58-bit"


@pytest.fixture
def paper(tiny_flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    monkeypatch.setattr(dpt_depth, "SIDE", 64)
    monkeypatch.setattr(llava_judge, "DESCRIPTION_TOKENS", 3)
    chosen = {"geneval:detector": "mask2former", "geneval:colors": "clip", "t2i-compbench:vqa": "blip"}
    chosen |= {f"t2i-compbench:{role}": n for role, n in (("detector", "owlv2"), ("depth", "dpt"), ("judge", "llava"))}
    found: list[object] = [tiny_flux, "--prompts", small_suites(tmp_path / "prompts", monkeypatch)]
    for role, name in chosen.items():
        found += ["--scorer", f"{role}={getattr(tiny_scorers, name)(tmp_path / 'scorers' / name)}"]
    return [*found, "--recipe", "absmean", "--device", "cpu", "--samples", 1, "--steps", 2, "--rounds", 1]


@pytest.mark.slow
def test_the_papers_three_tables(paper: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    refused = invoke(*paper, "--out", out)
    assert refused.exit_code == 2
    assert "not started: 17 of 17 stages, 51 pictures" in refused.stderr
    assert "unknown for 14 stages: nothing was measured here yet; add --yes" in refused.stderr
    assert not out.exists()
    done = invoke(*paper, "--out", out, "--yes")
    assert done.exit_code == 0, done.output
    page = (out / "report" / "report.md").read_text()
    for title in ("## GenEval", "## T2I-CompBench", "## Latency, memory and storage", "## Bytes"):
        assert title in page
    for row in ("| FLUX | – | substitutes |", "| 1.58-bit, no kernel | off | substitutes |"):
        assert page.count(row) == 2
    assert page.count("| 1.58-bit | on | substitutes |") == 2
    assert "(teacher)" not in page  # it has rows of its own
    assert "Substitute scorers, so not the suite's official metric" in page
    # The teacher's pictures are scored once, though every student is compared with them.
    assert {p.name.split(".")[-2] for p in out.glob("pictures/*/*.jsonl")} == {"verdicts", "scores", "fidelity"}
    changed = invoke(*paper, "--recipe", "fast", "--out", out, "--plan", "--json")
    assert changed.exit_code == 0, changed.output
    states = {s["name"]: s["state"] for s in json.loads(changed.stdout)["stages"]}
    assert states["draw-geneval-teacher"] == states["score-geneval-teacher"] == "done"
    assert states["quantize"] == "changed"
    assert states["check"] == states["draw-geneval-student"] == states["report"] == "waiting"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "'/nowhere' is no pipeline folder (it has no model_index.json)"),
        (["small", "--recipe", "bset"], "no recipe 'bset'; did you mean 'best'"),
        (["small", "--suite", "scene"], "there is no suite 'scene'; did you mean 'scenes'"),
        (["small", "--scorer", "detector=x"], "write SUITE:ROLE=FOLDER"),
        (["small", "--scorer", "geneval:detector=x"], "is of a suite that is not run (these are: scenes)"),
        (["small", "--device", "cuda:99"], "--device cuda:99"),
        (["small", "--recipe", "fast"], "add --yes to start, or --limit N"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], words: str, tmp_path: Path) -> None:
    done = invoke(*arguments, "--out", tmp_path / "out")
    assert done.exit_code in (2, 3)
    assert words in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_plan_of_the_small_flux(tmp_path: Path) -> None:
    shown = invoke("small", "--recipe", "fast", "--out", tmp_path / "out", "--plan")
    assert shown.exit_code == 0, shown.output
    words = " ".join(shown.stderr.split())
    assert "quantizing with recipe fast" in words
    assert "drawing scenes with 1.58-bit, no kernel" in words
    assert "11 of 11 stages, 5,760 pictures" in words
    assert "calibration" not in words  # `fast` reads weights alone
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tells_the_pace_of_the_whole(tiny_flux: Path, tmp_path: Path) -> None:
    common = [tiny_flux, "--suite", "scenes", "--recipe", "absmean", "--samples", 1, "--steps", 1, "--rounds", 1]
    common += ["--no-kernel-off", "--device", "cpu", "--out", tmp_path, "--batch-size", 4]  # one batch tells no pace
    assert invoke(*common, "--limit", 16, "--yes").exit_code == 0
    folder = next(tmp_path.glob("pictures/scenes-16x1-seed0/flux-*/"))
    for i, path in enumerate(sorted(folder.rglob("*.png"))):  # as if a picture had taken a minute
        os.utime(path, (1e9 + 60 * i, 1e9 + 60 * i))

    def drawing(*arguments: object) -> dict[str, Any]:
        shown = invoke(*common, "--limit", 80, "--plan", "--json", *arguments)
        assert shown.exit_code == 0, shown.output
        return {s["name"]: s for s in json.loads(shown.stdout)["stages"]}["draw-scenes-teacher"]

    assert (drawing()["pictures"], drawing()["seconds"]) == (80, pytest.approx(80 * 60))
    assert drawing("--steps", 2)["seconds"] is None  # drawn otherwise, it tells nothing
    refused = invoke(*common, "--limit", 80)
    assert refused.exit_code == 2
    assert "80 min" in refused.stderr.splitlines()[-1]
    assert "add --yes to start" in refused.stderr.splitlines()[-1]


def test_pictures_stay_when_the_same_model_comes_back(tiny_flux: Path, tmp_path: Path) -> None:
    common = [tiny_flux, "--suite", "scenes", "--recipe", "absmean", "--samples", 1, "--steps", 1, "--rounds", 1]
    common += ["--no-kernel-off", "--device", "cpu", "--limit", 2, "--out", tmp_path, "--yes"]
    assert invoke(*common).exit_code == 0
    weights = tmp_path / "flux-1.58bit" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    mended = invoke(*common)
    assert mended.exit_code == 0, mended.output
    lines = [line for line in mended.stderr.splitlines() if "│" not in line]
    assert "quantizing with recipe absmean (again: what it had left was changed or removed)" in lines
    assert not any(line.startswith(("drawing", "scoring")) for line in lines)


def test_nothing_that_took_long_is_removed_unasked(tiny_flux: Path, tmp_path: Path) -> None:
    common = [tiny_flux, "--suite", "scenes", "--samples", 1, "--steps", 1, "--rounds", 1, "--no-kernel-off"]
    common += ["--device", "cpu", "--limit", 2, "--out", tmp_path]
    first = [*common, "--recipe", "absmean", "--batch-size", 1]
    assert invoke(*first, "--yes").exit_code == 0
    pictures = {p: p.stat().st_mtime_ns for p in tmp_path.glob("pictures/**/*.png")}
    assert len(pictures) == 4
    assert "everything is done" in invoke(*first).stderr
    other = invoke(*common, "--recipe", "absmean", "--batch-size", 2)
    assert other.exit_code == 2
    last = other.stderr.splitlines()[-1]
    assert "4 pictures" in last
    assert "what was made before is removed: draw-scenes-teacher, draw-scenes-student" in last
    assert "batch_size was 1, now 2" in " ".join(other.stderr.replace("│", " ").split())
    recipe = invoke(*common, "--recipe", "fast", "--batch-size", 1)
    assert recipe.exit_code == 2
    assert "2 pictures" in recipe.stderr.splitlines()[-1]
    assert "is removed: quantize, draw-scenes-student" in recipe.stderr.splitlines()[-1]
    assert pictures == {p: p.stat().st_mtime_ns for p in tmp_path.glob("pictures/**/*.png")}
    done = invoke(*common, "--recipe", "fast", "--batch-size", 1, "--yes")
    assert done.exit_code == 0, done.output
    now = {p: p.stat().st_mtime_ns for p in tmp_path.glob("pictures/**/*.png")}
    assert len(now) == 4
    assert len(now.items() & pictures.items()) == 2  # the teacher's stay
