"""`tritflow evaluate geneval | t2i-compbench` on a tiny pipeline and tiny scorers, and what it refuses in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny_scorers
from suite_fakes import GENEVAL_ROWS, small_suites
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation.images import ImageSet
from tritflow.evaluation.scorers import dpt_depth, llava_judge, mask2former
from tritflow.results import read


def invoke(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mask2former, "SHORT_SIDE", 64)
    monkeypatch.setattr(dpt_depth, "SIDE", 64)
    monkeypatch.setattr(llava_judge, "DESCRIPTION_TOKENS", 3)
    return small_suites(tmp_path / "prompts", monkeypatch)


@pytest.fixture(scope="module")
def models(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from tritflow.testing import tiny_flux_folder

    student = tiny_flux_folder(tmp_path_factory.mktemp("student") / "student", seed=3)
    (student / "prompts.jsonl").write_text(json.dumps({"text": GENEVAL_ROWS[0]["prompt"]}) + "\n")
    return tiny_flux, student


@pytest.fixture(scope="module")
def scorers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("scorers")
    return {
        name: getattr(tiny_scorers, name)(folder / name)
        for name in ("mask2former", "clip", "blip", "owlv2", "dpt", "llava")
    }


def geneval(models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, out: Path, *more: object) -> Any:
    return invoke(
        *("geneval", "--model", models[1], "--against", models[0], "--prompts", prompts, "--device", "cpu"),
        *("--scorer", f"detector={scorers['mask2former']}", "--scorer", f"colors={scorers['clip']}"),
        *("--seeds-per-prompt", 1, "--out", out, *more),
    )


def test_geneval_against_a_teacher(
    models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    done = geneval(models, scorers, prompts, tmp_path / "out", "--label", "ours", "--noise-seed", 5, "--json")
    assert done.exit_code == 0, done.output
    run = json.loads(done.stdout)
    assert run["task"]["scored_by"] == "substitutes"
    assert set(run["task"]["substitutes"]) == {"detector", "colors"}
    assert run["task"]["scorers"]["detector"].startswith("transformers Mask2Former mask2former (")
    assert run["prompts"]["pictures"] == 7
    (origin, checksum), *more = run["prompts"]["sources"].items()
    assert origin.startswith("djghosh13/geneval@af4902f24d")
    assert len(checksum) == 64
    assert not more
    assert run["prompts"]["overlap"] == {"known": True, "count": 1, "ids": ["00000"]}
    assert set(run["paired"]["tags"]) == set(run["scores"]["tags"])
    assert run["seed_sets"]["base_seeds"] == [0, 5]
    assert "7 pictures; to draw 7" in done.stderr
    assert [r["label"] for r in read(tmp_path / "out" / "results.json", "geneval")] == ["ours"]
    sets = [ImageSet.open(p) for p in sorted((tmp_path / "out").iterdir()) if p.is_dir()]
    assert len(sets) == 3
    # Again, with words: nothing is drawn, and nobody can take the score for the official one.
    again = geneval(models, scorers, prompts, tmp_path / "out", "--no-fidelity")
    assert again.exit_code == 0, again.output
    assert "all 7 pictures are there" in again.output
    assert "geneval with substitute scorers" in again.output
    words = " ".join(again.output.split())
    assert "a substitute for mmdet mask2former_swin-s" in words
    assert "not the suite's official scores" in words
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert shown.exit_code == 0, shown.output
    assert "| FLUX (paper) | – | official scorer | 0.660 |" in shown.output
    assert "| ours | – | substitutes |" in shown.output


def test_a_dry_run_projects_the_whole(
    models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    done = geneval(models, scorers, prompts, tmp_path / "out", "--limit", 2)
    assert done.exit_code == 0, done.output
    assert "2 pictures; to draw 2" in done.output
    assert "the whole suite (14 pictures) would take about" in done.output  # two models of seven


def test_drawing_alone_then_the_official_scorer(
    models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    arguments = ["geneval", "--model", models[1], "--prompts", prompts, "--device", "cpu", "--seeds-per-prompt", 1]
    drawn = invoke(*arguments, "--out", out, "--draw-only")
    assert drawn.exit_code == 0, drawn.output
    assert "all pictures are in" in drawn.output
    missing = invoke(*arguments, "--out", out, "--official")
    assert missing.exit_code == 2
    assert "the official scorer's output is not there" in missing.output
    folder = next(p for p in out.iterdir() if p.is_dir())
    images = ImageSet.open(folder)
    rows = [
        {"filename": str(folder / e["path"]), "tag": e["tag"], "prompt": e["prompt"], "correct": True, "reason": ""}
        for e in images.entries
    ]
    (folder / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = invoke(*arguments, "--out", out, "--official", "--json")
    assert done.exit_code == 0, done.output
    run = json.loads(done.stdout)
    assert run["task"]["scored_by"] == "official scorer"
    assert run["task"]["substitutes"] == {}
    assert run["scores"]["overall"]["value"] == 1


def test_t2i_compbench(models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, tmp_path: Path) -> None:
    chosen = {"vqa": "blip", "detector": "owlv2", "depth": "dpt", "judge": "llava"}
    done = invoke(
        *("t2i-compbench", "--model", models[1], "--prompts", prompts, "--device", "cpu", "--seeds-per-prompt", 1),
        *(x for role, name in chosen.items() for x in ("--scorer", f"{role}={scorers[name]}")),
        *("--out", tmp_path / "out", "--json"),
    )
    assert done.exit_code == 0, done.output
    run = json.loads(done.stdout)
    assert run["prompts"]["pictures"] == 10
    assert run["prompts"]["split"] == "val"
    assert len(run["prompts"]["sources"]) == 8
    assert set(run["scores"]["tags"]) == {
        *("color", "shape", "texture", "spatial", "3d_spatial", "numeracy", "non_spatial", "complex")
    }
    assert set(run["task"]["scorers"]) == {*chosen, "parser"}
    shown = CliRunner().invoke(app, ["report", str(tmp_path / "out")])
    assert "| 1.58-bit (paper) | on | official scorer | 0.5812 |" in shown.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["genval"], "no suite 'genval'; did you mean 'geneval'"),
        (["geneval", "--scorer", "detector"], "write ROLE=FOLDER"),
        (["geneval", "--scorer", "depth=x"], "geneval has no scorer 'depth'"),
        (["geneval", "--split", "val"], "geneval has no split 'val'"),
        (["geneval", "--prompts", "/nowhere"], "tritflow prompts fetch"),
        (["t2i-compbench", "--tags", "colour"], "no tag 'colour'; did you mean 'color'"),
        (["scenes", "--official"], "scenes has no official scorer"),
        (["geneval", "--lpips", "/nowhere.safetensors"], "no such file, folder or hub id with LPIPS"),
    ],
)
def test_wrong_use_is_one_line(
    arguments: list[str], words: str, models: tuple[Path, Path], prompts: Path, tmp_path: Path
) -> None:
    more = ["--model", models[1], "--device", "cpu", "--out", tmp_path / "out"]
    if "--prompts" not in arguments:
        more += ["--prompts", prompts]
    if "--official" in arguments:
        more += ["--per-tag", 1, "--seeds-per-prompt", 1]
    result = invoke(*arguments, *more)
    assert result.exit_code == 2, result.output
    assert words in result.output
    errors = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert errors == result.output.splitlines()[-1:]


def test_scorers_that_cannot_be_had(
    models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    done = geneval(models, {**scorers, "mask2former": tmp_path / "nothing"}, prompts, tmp_path / "out")
    assert done.exit_code == 2
    assert "cannot load the detector scorer" in done.output
    assert "--scorer detector=FOLDER" in done.output


def test_bad_folders_are_refused_by_name(
    models: tuple[Path, Path], scorers: dict[str, Path], prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert geneval(models, scorers, prompts, out).exit_code == 0
    folder = next(p for p in sorted(out.iterdir()) if p.is_dir() and p.name.startswith("student"))

    def refused(change: Any, words: str) -> None:
        shutil.copytree(folder, tmp_path / "kept")
        change()
        done = geneval(models, scorers, prompts, out)
        assert done.exit_code == 2, done.output
        assert words in done.output
        shutil.rmtree(folder)
        shutil.move(tmp_path / "kept", folder)

    def edit(name: str, old: str, new: str) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    hash_ = json.loads((folder / "meta.json").read_text())["model"]["hash"]
    refused(
        lambda: edit("manifest.jsonl", f'"model_hash":"{hash_}"', '"model_hash":"bbbb"'), "one folder holds one model"
    )
    refused(lambda: edit("manifest.jsonl", '"seed":', '"seeds":'), "has no 'seed'")
    refused(lambda: edit("meta.json", '"name": "geneval"', '"name": "scenes"'), "(scenes 1, now geneval 1)")
    # Missing and half-written pictures are drawn again rather than refused; damage of the same length is not seen
    # until the picture is opened.
    path = next(folder.rglob("0000.png"))
    refused(lambda: path.write_bytes(bytes(path.stat().st_size)), "is half-written or was changed")
    path.unlink()
    done = geneval(models, scorers, prompts, out)
    assert done.exit_code == 0, done.output
    assert path.exists()
