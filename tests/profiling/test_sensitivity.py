import json

import pytest
import torch
from typer.testing import CliRunner

from tritflow.calibration.trajectories import Batch
from tritflow.cli.main import app
from tritflow.models import FLUX1
from tritflow.pipelines.quantize import quantize
from tritflow.profiling.sensitivity import SensitivityError, by_stream, measure, measure_linears, table
from tritflow.quantization.rounding import round_weight
from tritflow.quantization.ternarize import dequantize
from tritflow.report.figures import encode
from tritflow.report.figures import sensitivity as draw
from tritflow.report.sources import ReportError
from tritflow.results import read
from tritflow.testing import tiny_flux_transformer, transformer_inputs

PROMPTS = ["a red cube", "two blue stars", "a ring"]


@pytest.fixture(scope="module")
def run(tiny_flux):
    return measure(str(tiny_flux), prompts=PROMPTS, num_prompts=3, num_inference_steps=4, bins=2, device="cpu")


def test_an_error_is_that_of_the_velocity_with_one_linear_rounded():
    model = tiny_flux_transformer()
    kwargs = transformer_inputs(model, batch=6)
    kwargs.pop("return_dict", None)
    names = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_out"]
    state = {n: p.clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        before = model(**kwargs, return_dict=False)[0]
    batches = [
        Batch({n: t[rows] if len(t) == 6 else t for n, t in kwargs.items()}, before[rows])
        for rows in torch.arange(6).split(4)
    ]
    found = measure_linears(model, names, batches, bins=4)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters())
    for entry in found:
        linear = model.get_submodule(entry["name"])
        q = round_weight(linear.weight.detach())
        with torch.no_grad():
            linear.weight.copy_(dequantize(q.trits, q.weight_scale))
            change = (model(**kwargs, return_dict=False)[0] - before).square().flatten(1).mean(1)
            linear.weight.copy_(state[entry["name"] + ".weight"])
        size = before.square().flatten(1).mean(1)
        assert entry["error"]["all"] == pytest.approx(float(change.sum() / size.sum()), rel=1e-3)
        late = kwargs["timestep"] >= 0.75
        assert entry["error"]["bins"][3] == pytest.approx(float(change[late].sum() / size[late].sum()), rel=1e-3)


def test_every_block_linear_is_in_the_report_with_its_stream(run, tiny_flux):
    config = json.loads((tiny_flux / "transformer" / "config.json").read_text())
    assert [layer["name"] for layer in run["layers"]] == list(FLUX1.block_linears(config))
    streams = {layer["name"]: layer["stream"] for layer in run["layers"]}
    assert streams["transformer_blocks.0.ff_context.net.2"] == "text"
    assert streams["transformer_blocks.0.attn.add_k_proj"] == "text"
    assert streams["transformer_blocks.0.attn.to_out.0"] == "image"
    assert streams["transformer_blocks.0.norm1_context.linear"] == "condition"
    assert streams["single_transformer_blocks.0.proj_mlp"] == "all"
    assert run["pairs"] == 12
    assert run["bins"] == [0, 0.5, 1]
    # The text stream of the last double block still feeds the single blocks; nothing is without effect here.
    assert all(layer["error"]["all"] > 0 for layer in run["layers"])
    total = sum(layer["error"]["all"] for layer in run["layers"])
    assert sum(e["all"] for e in by_stream(run).values()) == pytest.approx(total)
    assert "sum over linears" in table(run)


def test_the_figure_is_the_same_from_the_same_run(run):
    assert encode(draw([run])) == encode(draw([run]))
    assert encode(draw([run]), "png")[:4] == b"\x89PNG"
    with pytest.raises(ReportError, match="no layers"):
        draw([{}])


def test_what_cannot_be_measured_is_said(tiny_flux, tmp_path):
    with pytest.raises(SensitivityError, match="--prompts"):
        measure(str(tiny_flux), device="cpu")
    quantize(tiny_flux, tmp_path / "ternary", "fast", device="cpu")
    with pytest.raises(SensitivityError, match="not dense"):
        measure(str(tmp_path / "ternary"), prompts=PROMPTS, device="cpu")


def test_the_command(tiny_flux, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = ["bench", "sensitivity", "--model", str(tiny_flux), "--prompts", str(prompts), "--device", "cpu"]
    arguments += ["--num-prompts", "2", "--steps", "2", "--bins", "2", "--json"]
    runner = CliRunner()
    done = runner.invoke(app, [*arguments, "--results", str(tmp_path / "r"), "--plot", str(tmp_path / "s.svg")])
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "r").glob("sensitivity-*.json")
    assert read(file)[0]["pairs"] == 4
    assert (tmp_path / "s.svg").read_bytes().startswith(b"<?xml")
    assert runner.invoke(app, [*arguments, "--plot", str(tmp_path / "s.jpg")]).exit_code == 2
