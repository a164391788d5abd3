import dataclasses
import json

import pytest
from typer.testing import CliRunner

from tritflow.cli.main import app
from tritflow.config import CalibrationConfig, DistillationConfig, Recipe, ReconstructionConfig, StreamingConfig
from tritflow.pipelines.quantize import quantize
from tritflow.profiling.projection import DOUBLE, KINDS, SINGLE, project, scaled, table
from tritflow.profiling.quantization import config_like, measure
from tritflow.recipes import load_recipe
from tritflow.results import append, path_for, read
from tritflow.testing import tiny_flux2_folder

PARTS = {"read", "pass", "round", "compensate_sample", "compensate_block", "importance", "train_step", "train_sample"}


@pytest.fixture(scope="module")
def run(tiny_flux):
    config, _ = config_like(str(tiny_flux))
    deep = {**config, "num_layers": 19, "num_single_layers": 38}
    return measure(deep, device="cpu", pixels=64, text_tokens=8, samples=4, batch_size=2, steps=2)


def test_every_stage_runs_on_blocks_of_the_width(run, tiny_flux):
    config, _ = config_like(str(tiny_flux))
    hidden = config["attention_head_dim"] * config["num_attention_heads"]
    for kind in KINDS:
        assert set(run["seconds"][kind]) == PARTS
        assert all(
            run["seconds"][kind][part] > 0 for part in ("read", "pass", "round", "compensate_sample", "importance")
        )
    assert set(run["peak_bytes"]) == {"pass", "round", "compensate", "importance", "reconstruct"}
    assert all(peak > 0 for peak in run["peak_bytes"].values())
    assert run["depth"] == {DOUBLE: 19, SINGLE: 38}
    assert run["blocks"] == {DOUBLE: 1, SINGLE: 1}
    assert run["bytes"]["streams"] == (16 + 8) * hidden * 4
    assert run["bytes"]["pair"] == (2 * 16 * config["in_channels"] + 1) * 4
    text = 8 * config["joint_attention_dim"] + config["pooled_projection_dim"]
    assert run["bytes"]["trajectory"] == (text + bool(config["guidance_embeds"])) * 4
    double = sum(n for n in (12 * hidden * hidden + 8 * hidden * hidden, 16 * hidden * hidden))
    assert double < run["parameters"][DOUBLE] < 1.2 * double


# Seconds that make sums easy: reading 1, passing 2 and so on, singles half of it.
MADE = {
    "device": "NVIDIA H200",
    "model": "made",
    "pixels": 1024,
    "dtype": "bfloat16",
    "depth": {DOUBLE: 2, SINGLE: 2},
    "parameters": {DOUBLE: 1000, SINGLE: 500},
    "peak_of": "GPU",
    "peak_bytes": {"pass": 1 << 30},
    "bytes": {"pair": 10, "trajectory": 7, "streams": 1 << 20, "rounded_double": 100, "rounded_single": 50},
    "seconds": {
        kind: {
            "read": 1 * f,
            "pass": 2 * f,
            "round": 3 * f,
            "compensate_block": 5 * f,
            "compensate_sample": 4 * f,
            "train_step": 8 * f,
            "train_sample": 6 * f,
            "importance": 7 * f,
        }
        for kind, f in ((DOUBLE, 1.0), (SINGLE, 0.5))
    },
}


def test_a_projection_is_the_sum_of_its_parts():
    recipe = Recipe(
        "r",
        compensation=True,
        compensation_samples=8,
        calibration=CalibrationConfig(num_prompts=5, num_inference_steps=4, batch_size=2),
        reconstruction=ReconstructionConfig(
            steps=10, window=2, stride=1, samples=16, batch_size=4, importance_samples=6, importance_batch=3
        ),
        distillation=DistillationConfig(steps=7, batch_size=3, checkpoint_every=4),
        streaming=StreamingConfig(block_cache="0"),
    )
    found = project(MADE, recipe)
    hours = {stage: value * 3600 for stage, value in found["hours"].items()}
    # 20 pairs pass 3 blocks' worth of 2 s; 3 batches of 4 steps read them at 1 s.
    assert hours["record"] == pytest.approx(20 * 6 + 12 * 3)
    assert hours["compensate"] == pytest.approx(3 * 5 + 8 * 3 * 4)
    # Windows (0, 1), (1, 2), (2, 3): 1 + 1, 1 + .5, .5 + .5 blocks' worth are trained; half of the blocks twice.
    trained = 10 * (8 + 4 * 6) * (2 + 1.5 + 1)
    assert hours["reconstruct"] == pytest.approx(
        trained + (16 + 32) * 6 * 2.5 + 6 * 3 * (7 + 2) + (2 * 2 + 3 * 1.5) * 3
    )
    assert hours["distill"] == pytest.approx(7 * 3 * (8 + 3 * 6))
    assert hours["write"] == pytest.approx(3 * 3)
    assert found["total_hours"] * 3600 == pytest.approx(sum(hours.values()))
    # Two checkpoints are written: float32 latents and AdamW's two moments.
    assert found["disk_bytes"] == 20 * 10 + 5 * 7 + 3 * 300 + 2 * 3000 * 12
    assert found["distillation_bytes"] == 3000 * 16
    limited = project(MADE | {"bytes": MADE["bytes"] | {"streams": 1 << 30}}, recipe)
    assert limited["samples"] == {"compensate": 8, "reconstruct": 1}
    # Half of 3,000 bf16 weights stay on the device: they are read once, the other half for every batch and step.
    cached = project(MADE, dataclasses.replace(recipe, streaming=StreamingConfig(block_cache="3000")))
    assert cached["hours"]["record"] * 3600 == pytest.approx(20 * 6 + 12 * 1.5 + 1.5)
    whole = project(MADE, dataclasses.replace(recipe, streaming=StreamingConfig(block_cache="1GiB")))
    assert whole["hours"]["record"] * 3600 == pytest.approx(20 * 6 + 3)
    fast = project(MADE, load_recipe("fast"))
    assert set(fast["hours"]) == {"round"}
    assert (fast["pairs"], fast["distillation_bytes"]) == (0, 0)


def test_the_table_says_what_is_projected():
    text = table(MADE, [project(MADE, load_recipe(name)) for name in ("fast", "balanced", "compensated")])
    assert "a sum of the parts above" in text
    assert "by bf16 peak, not measured" in text
    assert "end-to-end training needs" in text.split("balanced")[1].split("compensated")[0]
    assert "end-to-end training" not in text.split("compensated")[1]
    assert scaled("NVIDIA H200", 1.0)["A100"] == pytest.approx(989 / 312)
    assert scaled("some CPU", 1.0) == {}


def test_the_command_keeps_its_result(tiny_flux, tmp_path):
    done = CliRunner().invoke(
        app,
        ["bench", "quantization", "--like", str(tiny_flux), "--pixels", "32", "--text-tokens", "4", "--samples", "4",
         "--batch-size", "2", "--steps", "2", "--recipe", "fast", "--recipe", "large", "--results", str(tmp_path),
         "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    (path,) = tmp_path.glob("quantization-cpu-*.json")
    (kept,) = read(path, "quantization-cpu")
    assert [p["recipe"] for p in kept["projected"]] == ["fast", "large"]
    assert kept["random"]
    assert json.loads(done.stdout)["seconds"] == kept["seconds"]


def test_hours_follow_from_what_is_stored_and_from_whole_steps(tmp_path):
    def bench():
        done = CliRunner().invoke(
            app, ["bench", "quantization", "--stored", "--results", str(tmp_path), "--recipe", "large", "--json"]
        )
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    made = {
        **MADE,
        "model": "FLUX.1-dev",
        "text_tokens": 512,
        "versions": {},
        "command": "bench",
        "time": "2026-01-01T00:00:00Z",
    }
    path = path_for(tmp_path, "quantization-cuda", made["device"])
    append(path, "quantization-cuda", made)
    parts = bench()
    assert parts["projected"] == [project(made, load_recipe("large"))]
    assert (parts["measured"], parts["seconds"]) == (made["time"], MADE["seconds"])
    large = load_recipe("large").distillation
    step = {k: made[k] for k in ("model", "device", "pixels", "text_tokens", "versions", "command", "time")}
    own = {"recipe": "large", "batch_size": large.batch_size, "seconds": 5.0, "fits": True, "settings": {}}
    own["settings"] = {"compile_blocks": large.compile_blocks}
    others = [{"batch_size": 64}, {"recipe": "other"}, {"settings": {"compile_blocks": not large.compile_blocks}}]
    others.append({"fits": False, "seconds": None})
    for other in ({}, *others):
        run = {**step, **own, "seconds": 9.0 if other else 5.0, **other}
        append(path_for(tmp_path, "distillation-cuda", made["device"]), "distillation-cuda", run)
    (whole,) = bench()["projected"]
    assert whole["step_seconds"] == 5.0
    assert whole["hours"]["distill"] * 3600 == pytest.approx(large.steps * 5.0)
    assert whole["hours"]["record"] == parts["projected"][0]["hours"]["record"]
    assert [r["measured"] for r in read(path)[1:]] == [made["time"]] * 2


@pytest.mark.parametrize("options", [[], ["--results", "nowhere"]])
def test_nothing_stored_is_one_line(options):
    done = CliRunner().invoke(app, ["bench", "quantization", "--stored", *options])
    assert done.exit_code != 0
    assert "measure on a GPU first" in done.output


@pytest.mark.parametrize(
    ("options", "message"),
    [(["--blocks", "3"], "write double+single"), (["--samples", "3"], "two batches"), (["--blocks", "0+1"], "1+1")],
)
def test_impossible_options_are_one_line(options, message):
    done = CliRunner().invoke(app, ["bench", "quantization", *options])
    assert done.exit_code == 2
    assert message in done.output


def test_only_families_that_run_block_by_block(tmp_path):
    with pytest.raises(ValueError, match=r"no FLUX\.1"):
        config_like(str(tiny_flux2_folder(tmp_path / "klein")))
    with pytest.raises(ValueError, match="a block of each kind"):
        measure(blocks=(0, 1))


def test_distillation_that_cannot_fit_is_refused_before_any_work(tiny_flux, tmp_path, monkeypatch):
    import torch

    from tritflow.pipelines import quantize_job as module
    from tritflow.pipelines.demands import QuantizeError

    class Card:
        total_memory = 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(module, "pick_device", lambda device: torch.device("cuda"))
    with pytest.raises(QuantizeError, match="--recipe large"):
        quantize(tiny_flux, tmp_path / "out", "balanced", prompts=["a cube"])
    assert not (tmp_path / "out").exists()
