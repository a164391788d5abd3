"""From a dense folder to pictures: the command quantizes, stock diffusers loads, both draw the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from PIL import Image
from typer.testing import CliRunner

import forked
from tritflow import TernaryLinear, generate, load_pipeline
from tritflow.cli.main import app
from tritflow.formats.checkpoint import verify_folder
from tritflow.testing import tiny_flux_folder


def invoke(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_flux_folder(
        tmp_path_factory.mktemp("whole") / "flux", hidden=64, double=2, single=3, dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def made(flux: Path) -> Path:
    out = flux.parent / "made"
    done = invoke("quantize", flux, out, "--recipe", "absmean", "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    return out


def test_the_folder_is_sound_and_complete(made: Path) -> None:
    assert len(verify_folder(made / "transformer").linears) == 2 * 14 + 3 * 6
    meta = json.loads((made / "meta.json").read_text())
    assert meta["complete"]


def test_stock_classes_load_it_and_draw_what_the_command_draws(made: Path, tmp_path: Path) -> None:
    pipe = FluxPipeline.from_pretrained(made, torch_dtype=torch.float32)
    assert sum(isinstance(m, TernaryLinear) for m in pipe.transformer.modules()) == 46
    stock = pipe(
        "two blue stars",
        generator=torch.Generator("cpu").manual_seed(11),
        height=32,
        width=32,
        num_inference_steps=2,
        max_sequence_length=32,
    ).images[0]
    out = tmp_path / "a.png"
    done = invoke("generate", "two blue stars", "-m", made, "-o", out, "--seed", 11, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    with Image.open(out) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(stock))


def test_five_lines_of_the_readme(flux: Path, made: Path) -> None:
    transformer = FluxTransformer2DModel.from_pretrained(made / "transformer", torch_dtype=torch.bfloat16)
    pipe = FluxPipeline.from_pretrained(flux, transformer=transformer, torch_dtype=torch.bfloat16)
    image = pipe("a red cube on a blue sphere", height=32, width=32, num_inference_steps=1).images[0]
    assert image.size == (32, 32)


def test_resaving_through_stock_diffusers_changes_no_tensor(made: Path, tmp_path: Path) -> None:
    model = FluxTransformer2DModel.from_pretrained(made / "transformer", torch_dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert verify_folder(tmp_path).digest == verify_folder(made / "transformer").digest


def test_modes_and_batches_agree_closely(made: Path) -> None:
    plain = load_pipeline(made, device="cpu")
    eight = load_pipeline(made, device="cpu", mode="w2a8", backend="reference")
    a, b = (np.asarray(generate(pipe, "a star", 3)[0], dtype=np.int64) for pipe in (plain, eight))
    assert 0 < np.abs(a - b).mean() < 8


def test_a_fresh_process_needs_only_the_import(made: Path) -> None:
    code = f"""
import tritflow
from diffusers import FluxTransformer2DModel
model = FluxTransformer2DModel.from_pretrained({str(made / "transformer")!r})
print(type(model.transformer_blocks[0].attn.to_q).__name__)
"""
    done = forked.run(["-c", code], timeout=120)
    assert done.poll() == 0, done.stderr
    assert done.stdout.split()[-1] == "TernaryLinear"


def test_compare_and_inspect_know_the_result(flux: Path, made: Path, tmp_path: Path) -> None:
    done = invoke("compare", "a star", "-o", tmp_path / "c.png", "--device", "cpu", "--json", "--models", flux, made)
    assert done.exit_code == 0, done.stderr
    assert 5 < json.loads(done.stdout)["psnr_db"][1][0] < 60
    inspected = invoke("inspect", made / "transformer", "--json")
    assert inspected.exit_code == 0, inspected.stderr


def test_damage_is_exit_code_2_and_one_line(flux: Path, tmp_path: Path) -> None:
    out = tmp_path / "broken"
    assert invoke("quantize", flux, out, "--recipe", "absmean", "--device", "cpu").exit_code == 0
    weights = out / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-100] ^= 4
    weights.write_bytes(data)
    done = invoke("generate", "a star", "-m", out, "-o", tmp_path / "a.png", "--device", "cpu")
    assert done.exit_code == 2
    assert "does not match its checksum" in done.stderr
    assert "tritflow inspect" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "a.png").exists()
