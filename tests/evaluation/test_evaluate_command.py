"""`tritflow evaluate` on a real pipeline of random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.evaluation.contenders import contender, stored_mode, trained_prompts
from tritflow.evaluation.images import ImageSet
from tritflow.formats.checkpoint import TernaryFolder
from tritflow.results import read


def invoke(*arguments: object):  # type: ignore[no-untyped-def]
    return CliRunner().invoke(app, ["evaluate", "scenes", *map(str, arguments)])


@pytest.fixture(scope="module")
def two_models(tiny_flux: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny FLUX, and a copy with other weights that says which prompts it was trained on."""
    from tritflow.evaluation.api import get_task
    from tritflow.testing import tiny_flux_folder

    student = tiny_flux_folder(tmp_path_factory.mktemp("student") / "student", seed=3)
    trained = get_task("scenes").prompts(per_tag=1)[0].text
    (student / "prompts.jsonl").write_text(json.dumps({"text": trained}) + "\n")
    return tiny_flux, student


def test_against_a_teacher_as_json_and_again_without_drawing(
    two_models: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, student = two_models
    arguments = ["--model", student, "--against", teacher, "--per-tag", 1, "--seeds-per-prompt", 1, "--device", "cpu"]
    arguments += ["--out", tmp_path / "out", "--results", tmp_path / "results", "--label", "random"]
    first = invoke(*arguments, "--json")
    assert first.exit_code == 0, first.output
    run = json.loads(first.stdout)
    assert run["prompts"]["pictures"] == 8
    assert run["prompts"]["overlap"]["count"] == 1
    assert run["scores_without_overlap"]["tags"].keys() == run["scores"]["tags"].keys() - {"single_object"}
    assert run["model"]["hash"] != run["against"]["model"]["hash"]
    assert run["model"]["name"] == "student"  # no path of this machine
    assert run["settings"]["height"] == 32
    assert 3 < run["fidelity"]["psnr"]["value"] < 40
    names = [p.name for p in (tmp_path / "results").iterdir()]
    assert len(names) == 1
    assert [r["label"] for r in read(tmp_path / "results" / names[0], "scenes")] == ["random"]
    sets = [ImageSet.open(p) for p in sorted((tmp_path / "out").iterdir()) if p.is_dir()]
    assert [e["seed"] for e in sets[0].entries] == [e["seed"] for e in sets[1].entries]

    def never(*_: object, **__: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr("tritflow.pipelines.loading.load_pipeline", never)
    second = invoke(*arguments)
    assert second.exit_code == 0, second.output
    assert "trained on" in second.output
    assert "PSNR, object pixels" in second.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nowhere/x"], "no model '/nowhere/x'"),
        (["--model", "TINY", "--mode", "w2a8"], "dense model"),
        (["--model", "TINY", "--tags", "colours"], "no tag 'colours'; did you mean 'colors'"),
        (["--model", "TINY", "--trained-on", "/nowhere.txt"], "/nowhere.txt"),
    ],
)
def test_wrong_use_is_one_line(arguments: list[str], words: str, tiny_flux: Path, tmp_path: Path) -> None:
    result = invoke(*[str(tiny_flux) if a == "TINY" else a for a in arguments], "--out", tmp_path)
    assert result.exit_code == 2
    assert words in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_contender_takes_the_folders_settings(tiny_flux: Path) -> None:
    plain = contender(str(tiny_flux), device="cpu")
    assert (plain.settings.height, plain.settings.num_inference_steps) == (32, 2)
    assert plain.settings.extra == {"dtype": "float32", "max_sequence_length": 32}
    other = contender(str(tiny_flux), device="cpu", num_inference_steps=5, guidance_scale=0.0)
    assert (other.settings.num_inference_steps, other.settings.guidance_scale) == (5, 0.0)
    assert other.model == plain.model


def test_mode_is_read_from_the_checkpoint(tiny_flux: Path, tmp_path: Path) -> None:
    assert stored_mode(tiny_flux / "transformer") is None
    copy = tmp_path / "transformer"
    shutil.copytree(tiny_flux / "transformer", copy)
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "tritflow", "mode": "w2a8"}
    (copy / "config.json").write_text(json.dumps(config))
    assert stored_mode(copy) == "w2a8"


def test_what_a_model_was_trained_on(two_models: tuple[Path, Path], tmp_path: Path) -> None:
    teacher, student = two_models
    assert trained_prompts(str(teacher)) is None
    assert len(trained_prompts(str(student)) or []) == 1
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert trained_prompts(str(student), tmp_path / "p.txt") == ["one", "two"]


def test_the_shipped_students_prompts_are_told_by_a_file(tmp_path: Path) -> None:
    """Its meta.json names a set of the training's, by count and SHA-256, that a command makes again (model card)."""
    from tritflow.assets import student_path

    meta = json.loads((student_path() / "meta.json").read_text())
    assert meta["digest"] == TernaryFolder(student_path() / "transformer").digest
    recorded = meta["prompts"]
    assert recorded["count"] == 131072
    assert recorded["sha256"] in (student_path().parents[3] / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert trained_prompts("small-student") is None
    told = tmp_path / "told.txt"
    told.write_text("a red circle\ntwo redᚠ\n", encoding="utf-8")
    assert trained_prompts("small-student", told) == ["a red circle", "two redᚠ"]


def test_captions_of_the_world_are_known_by_their_number(tmp_path: Path) -> None:
    from tritflow.pipelines.scene_prompts import scene_prompts
    from tritflow.scenes.training_set import training_captions

    made = scene_prompts("scenes:300")
    assert made is not None
    (tmp_path / "meta.json").write_text(json.dumps({"kind": "ternary", "prompts": made.describe()}))
    assert trained_prompts(str(tmp_path)) == training_captions(300)


def test_a_quantized_model_names_its_prompts_by_hash(tmp_path: Path) -> None:
    from tritflow.calibration.prompts import load_prompts

    base, model = tmp_path / "base", tmp_path / "model"
    for folder in (base, model):
        folder.mkdir()
    (base / "calibration_prompts.txt").write_text("a red star\na blue ring\n")
    recorded = load_prompts(base / "calibration_prompts.txt").describe()

    def says(prompts: object) -> list[str] | None:
        meta = {"kind": "ternary", "prompts": prompts, "base": "../base"}
        (model / "meta.json").write_text(json.dumps(meta))
        return trained_prompts(str(model))

    assert says(recorded) == ["a red star", "a blue ring"]
    assert says(None) == []
    assert says({**recorded, "sha256": "0" * 64}) is None


def test_the_time_left_is_said_after_the_first_batch_and_again_after_the_third(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Loading takes 500 s here, the first batch 40 s, warm-up and all, and the others 20 s each."""
    from tritflow.cli import evaluate as command

    now = [0.0]
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])

    def said() -> str:
        return capsys.readouterr().err

    with command._stages() as stage:
        for seconds, done, words in (
            (0, 0, ""),
            (500, 0, ""),
            (40, 16, "drawing FLUX: about 6 min left"),  # 144 at 2.5 s
            (20, 32, ""),
            (20, 48, "drawing FLUX: about 2 min left"),  # 112 at 1.25 s
            (20, 64, ""),
        ):
            now[0] += seconds
            stage("drawing FLUX", done, 160)
            assert said().strip() == words
        stage("scoring FLUX", 0, 160)
        stage("scoring FLUX", 16, 160)
        assert said() == ""
