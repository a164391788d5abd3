import pytest

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.contenders import contender
from tritflow.pipelines.quantize import quantize
from tritflow.pipelines.rivals import RivalError
from tritflow.testing import tiny_flux_folder


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("wide") / "flux", hidden=256, heads=4)


def test_a_rival_draws_from_the_same_noise_and_says_its_bits(wide):
    teacher = contender(str(wide), device="cpu")
    rival = contender(str(wide), device="cpu", rival="q4_k-simulated")
    assert rival.model.hash != teacher.model.hash
    assert rival.model.name == "flux-q4_k-simulated"
    assert rival.settings.extra["rival"] == "q4_k-simulated"
    assert teacher.facts is None
    assert rival.facts is not None
    facts = rival.facts()
    assert facts["bits_per_weight"] == 4.5
    assert facts["simulated"] is True
    prompts, seeds = ["a red cube"], [3]
    one, other = (who.load()(prompts, seeds)[0] for who in (teacher, rival))
    assert one.size == other.size
    assert one.tobytes() != other.tobytes()


def test_what_cannot_be_is_refused_before_anything_is_drawn(wide, tmp_path):
    with pytest.raises(RivalError, match="did you mean 'hqq-2'"):
        contender(str(wide), device="cpu", rival="hqq2")
    with pytest.raises(RivalError, match="torchao"):
        contender(str(wide), device="cpu", rival="torchao-int4")
    quantize(wide, tmp_path / "ternary", "fast", device="cpu")
    with pytest.raises(EvaluationError, match="ternary already"):
        contender(str(tmp_path / "ternary"), device="cpu", rival="q4_k-simulated")


def test_gptq_calibrates_on_the_folders_prompts_and_is_nearer_than_two_bits_alone(wide, tmp_path):
    import shutil

    import torch

    from tritflow.models import FLUX1
    from tritflow.pipelines.loading import load_pipeline
    from tritflow.pipelines.rivals import RIVALS, apply_rival_
    from tritflow.testing import relative_error, transformer_inputs

    folder = tmp_path / "flux"
    shutil.copytree(wide, folder)
    with pytest.raises(RivalError, match=r"has none; write one"):
        contender(str(folder), device="cpu", rival="gptq-2").load()(["a red cube"], [0])
    (folder / "calibration_prompts.txt").write_text("a red cube\na blue star\none ring\ntwo cubes\n")
    facts = contender(str(folder), device="cpu", rival="gptq-2").facts()
    assert facts["bits_per_weight"] == pytest.approx(2 + 18 / 64, abs=0.01)
    assert facts["simulated"] is True
    errors = {}
    for name in ("gptq-2", "tq2_0-simulated"):
        pipe = load_pipeline(str(folder), device="cpu", dtype=torch.float32)
        model = pipe.transformer
        inputs = transformer_inputs(model, batch=2)
        with torch.no_grad():
            before = model(**inputs)[0]
            names = list(FLUX1.block_linears({"_class_name": "FluxTransformer2DModel", **model.config}))
            apply_rival_(RIVALS[name], model, names, pipe=pipe, folder=folder)
            errors[name] = relative_error(model(**inputs)[0], before)
    assert errors["gptq-2"] < 0.7 * errors["tq2_0-simulated"]


def test_a_ternary_model_says_its_bits_too(wide, tmp_path):
    quantize(wide, tmp_path / "ternary", "fast", device="cpu", packing="2bit")
    facts = contender(str(tmp_path / "ternary"), base=str(wide), device="cpu").facts()
    assert facts["name"] == "tritflow"
    assert 2.0 < facts["bits_per_weight"] < 2.1


def test_every_rival_in_turn_a_failing_one_named_and_nothing_twice(wide, tmp_path):
    import json

    from typer.testing import CliRunner

    from tritflow.cli.main import app
    from tritflow.results import read

    arguments = [
        "evaluate", "scenes", "--model", str(wide), "--against", str(wide), "--rivals",
        "tq2_0-simulated,torchao-int4,q4_k-simulated", "--tags", "single_object", "--per-tag", "2",
        "--seeds-per-prompt", "1", "--device", "cpu", "--out", str(tmp_path / "out"), "--results", str(tmp_path / "r"),
    ]  # fmt: skip
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    assert "torchao-int4 failed: torchao" in first.output
    assert "2 of 3 rivals done; not done: torchao-int4" in first.output
    runs = read(next((tmp_path / "r").iterdir()), "scenes")
    assert [r["quantizer"]["name"] for r in runs] == ["tq2_0-simulated", "q4_k-simulated"]
    assert runs[0]["label"] == "GGUF TQ2_0 (simulated)"
    assert all(r["paired"] and r["fidelity"]["psnr"] for r in runs)
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 0, again.output
    assert again.output.count("results are in") == 2
    assert read(next((tmp_path / "r").iterdir()), "scenes") == runs
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["runs"]) == 2
    neither = CliRunner().invoke(app, [*arguments, "--rival", "nf4"])
    assert "not both" in neither.output
