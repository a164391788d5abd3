"""`torchrun ... tritflow quantize` on two GPUs, joined by NCCL, against one: sharded (FSDP2) and replicated (Muon)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import forked
from tritflow.formats.checkpoint import verify_folder

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

CALIBRATION = """
[calibration]
num_inference_steps = 4
batch_size = 8
"""
DISTILLATION = """
[distillation]
steps = 40
batch_size = 16
learning_rate = 3e-4
warmup_steps = 2
checkpoint_every = 20
"""
SHARDED = f"compensation = true\ncompensation_samples = 16\n{CALIBRATION}{DISTILLATION}"
ONLINE = """
[online]
pool = 4
num_inference_steps = 4
student_share = 0.5
"""
REPLICATED = f'{CALIBRATION}{ONLINE}{DISTILLATION}optimizer = "muon"\n'


def quantized(source: Path, out: Path, recipe: Path, prompts: Path, processes: int) -> dict[str, Any]:
    """The report of `tritflow quantize` by so many processes, a GPU each."""
    command = ["-m", "tritflow.cli.main", "quantize", str(source), str(out), "--recipe", str(recipe)]
    done = forked.torchrun([*command, "--prompts", str(prompts), "--device", "cuda", "--json"], processes)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(done.stdout)
    verify_folder(out / "transformer")
    return report


@pytest.mark.parametrize("recipe", [SHARDED, REPLICATED], ids=["sharded", "replicated"])
def test_two_gpus_make_the_student_of_one(tiny_flux, tmp_path, recipe):
    file, prompts = tmp_path / "spread.toml", tmp_path / "prompts.txt"
    file.write_text(recipe)
    prompts.write_text(
        "\n".join(f"a {color} {shape}" for color in ("red", "blue", "green", "black") for shape in ("cube", "star"))
    )
    one, two = (quantized(tiny_flux, tmp_path / str(n), file, prompts, n)["validation_mse"] for n in (1, 2))
    assert set(one) == set(two) == {"0", "20", "40"}
    assert two["0"] == pytest.approx(one["0"], rel=1e-3)
    # Sharded, both see the same pairs; replicated, the second process has trajectories of its own.
    assert two["40"] == pytest.approx(one["40"], rel=0.02 if recipe == SHARDED else 0.2)
    assert two["40"] < two["0"]
