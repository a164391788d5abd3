"""Column scales from calibration undo planted outliers: W2A8 keeps on the twin what it keeps on the plain teacher."""

import dataclasses
import functools
import json

import pytest
import torch
from diffusers import FluxTransformer2DModel

from tritflow.config import CalibrationConfig, ConfigError, Recipe
from tritflow.pipelines import quantize as module
from tritflow.pipelines.quantize import QuantizeError, quantize
from tritflow.recipes import load_recipe
from tritflow.testing import tiny_flux_folder, transformer_inputs
from tritflow.training.twin import make_twin

PROMPTS = [f"{n} {c} {s}" for n in ("one", "two") for c in ("red", "blue", "green") for s in ("cube", "star")]
PLAIN = Recipe(
    "plain",
    compensation=True,
    compensation_samples=40,
    calibration=CalibrationConfig(num_inference_steps=4, batch_size=4),
)
SMOOTH = dataclasses.replace(PLAIN, name="smooth", smoothing=0.25)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "mine.txt"
    path.write_text("\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny_flux_folder(tmp_path_factory.mktemp("wide") / "flux", hidden=64, heads=4, double=1, single=2)


@pytest.fixture(scope="module")
def twin(teacher, tmp_path_factory):
    folder = tmp_path_factory.mktemp("twin") / "flux"
    make_twin(teacher, folder, channels=3, dtype=torch.float32)
    return folder


def velocity_error(folder, teacher):
    """Relative mean square error on inputs that no stage has seen."""
    dense = FluxTransformer2DModel.from_pretrained(teacher / "transformer")
    student = FluxTransformer2DModel.from_pretrained(folder)
    kwargs = transformer_inputs(dense, batch=16, seed=5)
    with torch.no_grad():
        expected = dense(**kwargs)[0]
        return float((student(**kwargs)[0] - expected).square().mean() / expected.square().mean())


@pytest.fixture(scope="module")
def student(teacher, twin, prompts, tmp_path_factory):
    root = tmp_path_factory.mktemp("students")
    cache = {}

    def of(source, recipe, mode):
        key = (source, recipe.name, mode)
        if key not in cache:
            out = root / "-".join(key)
            folder = {"teacher": teacher, "twin": twin}[source]
            cache[key] = quantize(folder, out, recipe, mode=mode, prompts=prompts, device="cpu").transformer
        return cache[key]

    return of


@pytest.fixture(scope="module")
def error(student, teacher):
    return functools.cache(lambda source, recipe, mode: velocity_error(student(source, recipe, mode), teacher))


def test_w2a8_on_the_twin_is_as_good_as_on_the_teacher_with_smoothing_and_not_without(error):
    assert error("twin", SMOOTH, "w2a8") < 1.15 * error("teacher", SMOOTH, "w2a8")
    assert error("twin", SMOOTH, "w2a8") < 1.02 * error("twin", SMOOTH, "w2a16")
    assert error("twin", PLAIN, "w2a8") > 2 * error("twin", SMOOTH, "w2a8")
    assert error("twin", PLAIN, "w2a8") > 1.1 * error("twin", PLAIN, "w2a16")  # 8 bits do harm there


def test_smoothing_without_compensation_undoes_them_too(error):
    """Rounding alone loses far more than 8 bits do, so only sameness can be asked for."""
    smooth = dataclasses.replace(SMOOTH, name="rounded", compensation=False)
    assert error("twin", smooth, "w2a8") == pytest.approx(error("teacher", smooth, "w2a8"), rel=0.1)


def test_scales_for_outlier_channels_alone_undo_them(error, student):
    few = dataclasses.replace(SMOOTH, name="few", smoothing=0.0, smoothing_outliers=20.0)
    assert error("twin", few, "w2a8") < 1.1 * error("teacher", few, "w2a8")
    assert error("twin", few, "w2a8") < 0.6 * error("twin", PLAIN, "w2a8")
    scales = {}
    for source in ("teacher", "twin"):
        model = FluxTransformer2DModel.from_pretrained(student(source, few, "w2a8"))
        scales[source] = {n: m.input_scale for n, m in model.named_modules() if hasattr(m, "input_scale")}
    assert all(bool((c == 1).all()) for c in scales["teacher"].values())
    changed = {n: int((c != 1).sum()) for n, c in scales["twin"].items()}
    assert {count for name, count in changed.items() if name.endswith("to_q")} == {3}
    assert not any(count for name, count in changed.items() if name.endswith("norm.linear"))


def test_skipped_linears_keep_scales_of_one(teacher, prompts, tmp_path):
    skip = dataclasses.replace(SMOOTH, smoothing_skip=("*.norm.linear", "*.norm1*.linear"))
    model = FluxTransformer2DModel.from_pretrained(
        quantize(teacher, tmp_path / "out", skip, prompts=prompts, device="cpu").transformer
    )
    ones = {n for n, m in model.named_modules() if hasattr(m, "input_scale") and bool((m.input_scale == 1).all())}
    assert ones == {n for n, m in model.named_modules() if n.endswith("linear") and hasattr(m, "input_scale")}
    assert ones


def test_scales_are_stored_and_ranges_kept(teacher, prompts, tmp_path, monkeypatch):
    seen = []
    report = quantize(
        teacher, tmp_path / "out", SMOOTH, prompts=prompts, device="cpu", keep_work=True,
        on_progress=lambda stage, done, total: seen.append(stage),
    )  # fmt: skip
    assert list(dict.fromkeys(seen)) == ["record", "range", "compensate", "write", "copy"]
    student = FluxTransformer2DModel.from_pretrained(report.transformer)
    assert student.single_transformer_blocks[1].proj_out.input_scale.std() > 0
    assert (tmp_path / "out" / ".work" / "ranges.safetensors").is_file()
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    assert meta["recipe"]["smoothing"] == 0.25
    assert meta["recipe"]["ternary"]["column_scale"] is True


def test_settings_that_contradict_are_named(teacher, prompts, tmp_path):
    with pytest.raises(QuantizeError, match="--no-column-scale"):
        module.plan(teacher, SMOOTH, prompts=prompts, column_scale=False)
    for text, message in (
        ("smoothing = 1.5", "between 0 and 1"),
        ("smoothing = true", "between 0 and 1"),
        ("smoothing = 0.5\nternarizer = 'absmean'", "mse ternarizer"),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_recipe(path)
    assert module.needs_teacher(Recipe("x", smoothing=0.0))
