"""`torchrun ... tritflow quantize`: recording and distillation are spread over all, the rest is the first's."""

import json

import pytest

import forked
from tritflow.formats.checkpoint import verify_folder
from tritflow.pipelines.quantize import quantize

RECIPE = """
compensation = true
compensation_samples = 16

[calibration]
num_inference_steps = 4
batch_size = 4

[distillation]
steps = 8
batch_size = 4
learning_rate = 3e-4
warmup_steps = 2
checkpoint_every = 4
"""


@pytest.mark.slow
def test_two_processes_make_one_student(tiny_flux, tmp_path):
    recipe, prompts = tmp_path / "spread.toml", tmp_path / "prompts.txt"
    recipe.write_text(RECIPE)
    prompts.write_text(
        "\n".join(f"a {color} {shape}" for color in ("red", "blue", "green") for shape in ("cube", "star"))
    )

    command = ["-m", "tritflow.cli.main", "quantize", str(tiny_flux), str(tmp_path / "two")]
    command += ["--recipe", str(recipe), "--prompts", str(prompts), "--device", "cpu", "--json", "--keep-work"]
    done = forked.torchrun(command, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    two = json.loads(done.stdout)  # one process speaks
    one = quantize(tiny_flux, tmp_path / "one", str(recipe), prompts=prompts, device="cpu", keep_work=True)
    verify_folder(tmp_path / "two" / "transformer")
    assert json.loads((tmp_path / "two" / "meta.json").read_text())["complete"]
    recorded = [tmp_path / name / ".work" / "trajectories" for name in ("one", "two")]
    assert len(list(recorded[1].glob("shard-*"))) == 2  # one from each process
    for path in recorded[0].iterdir():
        assert path.read_bytes() == (recorded[1] / path.name).read_bytes(), path.name
    assert {int(k) for k in two["validation_mse"]} == set(one.validation) == {0, 4, 8}
    assert two["validation_mse"]["0"] == pytest.approx(one.validation[0], rel=1e-5)
    assert two["validation_mse"]["8"] == pytest.approx(one.validation[8], rel=1e-2)
    assert two["validation_mse"]["8"] < two["validation_mse"]["0"]
    again = forked.run_ranks(command, 2)
    assert [rank.poll() for rank in again] == [0, 0], [rank.stderr[-3000:] for rank in again]
    assert json.loads(again[0].stdout)["digest"] == two["digest"]  # finished already
    assert again[1].stdout == ""
