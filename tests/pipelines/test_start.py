"""A second leg from a finished student, and a second run with other noise."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tritflow.assets import asset_path
from tritflow.config import CalibrationConfig, ConfigError, DistillationConfig, OnlineConfig, Recipe
from tritflow.formats.checkpoint import TernaryFolder, verify_folder
from tritflow.formats.packing import unpack
from tritflow.formats.source import open_source
from tritflow.pipelines.quantize import QuantizeError, plan, quantize
from tritflow.pipelines.start import LATENTS, STEPS, Start, StartError, pack_latent
from tritflow.recipes import override, recipe_hash


def test_the_shipped_student_is_of_the_shipped_teacher():
    source = open_source(asset_path("small") / "transformer")
    assert (
        Start("small-student", source.fingerprint()).digest
        == verify_folder(asset_path("small-student") / "transformer").digest
    )


LEG = Recipe(
    "leg",
    calibration=CalibrationConfig(num_inference_steps=4, batch_size=4),
    online=OnlineConfig(pool=4, num_inference_steps=4),
    distillation=DistillationConfig(
        steps=60, batch_size=8, optimizer="muon", learning_rate=2e-2, rest_learning_rate=1e-3, warmup_steps=3
    ),
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text(
        "\n".join(f"{n} {c} {s}" for n in ("one", "two") for c in ("red", "blue") for s in ("cube", "star"))
    )
    return path


@pytest.fixture(scope="module")
def first(tiny_flux, prompts, tmp_path_factory):
    out = tmp_path_factory.mktemp("legs") / "first"
    report = quantize(tiny_flux, out, LEG, prompts=prompts, device="cpu", keep_latents=True)
    assert report.validation[60] < report.validation[0]
    return out, report


def trits(folder):
    stored = TernaryFolder(folder / "transformer")
    return {n: unpack(stored.linear(n).packed, k, stored.ternary.packing) for n, k in stored.linears.items()}


def test_latents_are_kept_to_a_64th_of_a_trit_and_round_to_the_same_trits():
    latent = torch.linspace(-2.5, 2.5, 100_001)
    latent = torch.cat([latent, torch.tensor([-0.5, 0.5, 0.0])]).view(1, -1)
    back = (pack_latent(latent).float() + 0.5) / STEPS
    assert torch.equal(back.round().clamp(-1, 1), latent.round().clamp(-1, 1))
    inside = latent.abs() < 1.99
    assert float((back - latent)[inside].abs().max()) <= 1.01 / STEPS


@pytest.mark.parametrize("kept", [True, False])
def test_a_leg_begins_where_the_student_ended_and_learns_on(tiny_flux, prompts, first, tmp_path, kept):
    folder, report = first
    begin = tmp_path / "begin"
    shutil.copytree(folder, begin)
    if not kept:
        (begin / LATENTS).unlink()
    still = override(LEG, ["distillation.learning_rate=0.0", "distillation.scale_learning_rate=0.0",
                           "distillation.rest_learning_rate=0.0", "distillation.steps=1"])  # fmt: skip
    same = quantize(tiny_flux, tmp_path / "same", still, prompts=prompts, device="cpu", start=begin)
    assert same.validation[0] == pytest.approx(report.validation[60], rel=1e-3)
    assert all(torch.equal(t, trits(folder)[n]) for n, t in trits(tmp_path / "same").items())
    tensors = {n: TernaryFolder(f / "transformer").tensor("proj_out.weight") for n, f in
               (("first", folder), ("same", tmp_path / "same"), ("source", None)) if f}  # fmt: skip
    assert torch.equal(tensors["first"], tensors["same"])  # the tuned dense parameters came along
    on = quantize(tiny_flux, tmp_path / "on", LEG, prompts=prompts, device="cpu", start=begin, seed=3)
    assert on.validation[60] < report.validation[60]
    meta = json.loads((tmp_path / "on" / "meta.json").read_text())
    assert meta["parents"]["start"].startswith(report.digest)
    assert meta["parents"]["start"].endswith("latents") == kept
    assert meta["seed"] == 3
    # Another start is another job.
    with pytest.raises(QuantizeError, match="--overwrite"):
        quantize(tiny_flux, tmp_path / "on", LEG, prompts=prompts, device="cpu", seed=3)


def test_kept_latents_are_those_of_the_student(first):
    folder, _ = first
    latents = load_file(folder / LATENTS)
    for name, t in trits(folder).items():
        assert torch.equal(((latents[name].float() + 0.5) / STEPS).round().clamp(-1, 1).to(torch.int8), t)
    assert sum(t.nbytes for t in latents.values()) == sum(t.numel() for t in trits(folder).values())


def test_what_cannot_be_started_from_is_named(tiny_flux, prompts, first, tmp_path):
    folder, _ = first
    with pytest.raises(StartError, match="no finished ternary model"):
        plan(tiny_flux, LEG, prompts=prompts, start=tmp_path)
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    meta = json.loads((wrong / "meta.json").read_text())
    meta["parents"]["source"] = "0" * 16
    (wrong / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(StartError, match="other weights"):
        plan(tiny_flux, LEG, prompts=prompts, start=wrong)
    (wrong / "meta.json").write_bytes((folder / "meta.json").read_bytes())
    (wrong / LATENTS).write_bytes((wrong / LATENTS).read_bytes()[:50])
    with pytest.raises(StartError, match="is damaged; remove it"):
        plan(tiny_flux, LEG, prompts=prompts, start=wrong)
    with pytest.raises(QuantizeError, match="distils nothing"):
        plan(tiny_flux, "fast", start=folder)
    with pytest.raises(QuantizeError, match="no latents to keep"):
        plan(tiny_flux, "fast", keep_latents=True)
    other = tmp_path / "other"
    quantize(tiny_flux, other, LEG, prompts=prompts, device="cpu", settings=["distillation.steps=1"])
    with pytest.raises(QuantizeError, match="without --keep-latents"):
        quantize(tiny_flux, other, LEG, prompts=prompts, device="cpu", settings=["distillation.steps=1"],
                 keep_latents=True)  # fmt: skip


def test_a_seed_draws_everything_anew(tiny_flux, prompts):
    recipe = plan(tiny_flux, LEG, prompts=prompts, seed=5).recipe
    assert (recipe.calibration.seed, recipe.distillation.seed, recipe.reconstruction.seed) == (5, 5, 5)
    assert recipe_hash(recipe) != recipe_hash(LEG)
    assert dataclasses.replace(plan(tiny_flux, LEG, prompts=prompts).recipe, name="leg") == LEG


def test_settings_are_changed_by_name():
    changed = override(LEG, ["distillation.steps=7", "smoothing=0.0", 'ternary.packing="base3"'])
    assert (changed.distillation.steps, changed.distillation.batch_size) == (7, 8)
    assert changed.smoothing == 0.0
    assert changed.ternary.packing == "base3"
    assert override(LEG, ["ternary.packing=base3"]).ternary == changed.ternary  # a word needs no quotes
    assert override(LEG, []) is LEG
    for setting, message in (
        ("distillation.stepz=7", "no setting 'stepz'; did you mean 'steps'"),
        ("distilation.steps=7", "unknown setting 'distilation'"),
        ("steps", "write TABLE.KEY=VALUE"),
        ("distillation.steps=", "write TABLE.KEY=VALUE"),
        ("distillation.steps=many", "steps: a whole number is expected, not 'many'"),
        ("distillation.steps=7.5", "steps: a whole number is expected, not 7.5"),
        ("distillation.steps=true", "steps: a whole number is expected, not True"),
        ("distillation.learning_rate=fast", "learning_rate: a number is expected, not 'fast'"),
        ("distillation.lean=1", "lean: true or false is expected, not 1"),
        ("distillation.optimizer=mun", "did you mean 'muon'"),
    ):
        with pytest.raises(ConfigError, match=message):
            override(LEG, [setting])
