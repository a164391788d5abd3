"""FSDP2 by gloo: two processes distil what one does."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file

import forked
from tritflow.calibration.trajectories import TrajectoryWriter
from tritflow.distillation.sharded import Ranks
from tritflow.testing import tiny_flux_transformer, transformer_inputs

SCRIPT = """
import json, os, sys
import torch
from safetensors.torch import save_file
from tritflow.calibration.trajectories import Trajectories
from tritflow.config import DistillationConfig, TernaryConfig
from tritflow.distillation.parameters import parameter_groups
from tritflow.distillation.sharded import gathered, processes, shard_
from tritflow.distillation.velocity import distill_
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.quantization.convert import prepare_
from tritflow.testing import tiny_flux_transformer

data, out, stop, optimizer = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
torch.set_num_threads(1)
names = ["transformer_blocks.0", "single_transformer_blocks.0"]
config = DistillationConfig(
    steps=8, batch_size=4, warmup_steps=2, learning_rate=1e-2, rest_learning_rate=1e-3, checkpoint_every=3,
    optimizer="adamw" if optimizer == "adamw" else "muon", lean=optimizer == "lean",
)

def progress(step, steps, loss):
    if step == stop:
        os._exit(3)

with processes("cpu") as ranks:
    model = tiny_flux_transformer(double=1, single=1, seed=3).requires_grad_(False)
    prepare_(model, TernaryConfig(), latent_dtype=torch.bfloat16 if config.lean else torch.float32)
    total = sum(p.numel() for p in model.parameters())
    if optimizer == "adamw":
        shard_(model, names, "cpu")
    groups = parameter_groups(model, config)
    held = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in model.parameters())
    result = distill_(
        lambda **kwargs: model(**kwargs, return_dict=False)[0], groups, Trajectories(data, holdout=0.25), config, out,
        on_progress=progress,
    )
    tensors = {}
    for name in names:
        with gathered(model.get_submodule(name)) as block:
            for leaf, twin in block.named_modules():
                if isinstance(twin, FakeTernaryLinear):
                    tensors[f"{name}.{leaf}.weight"] = twin.weight.detach().clone()
                    tensors[f"{name}.{leaf}.trits"] = twin.trits()
    if ranks.first:
        save_file(tensors, out + "/student.safetensors")
        note = {"held": held, "total": total, "world": ranks.world}
        with open(out + "/note.json", "w") as stream:
            json.dump({"loss": result.loss, "validation": result.validation, **note}, stream)
    ranks.wait()
    # The model at this level holds gloo's threads, which torch may abort on at exit, when all is done.
    os._exit(0)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded") / "t"
    model = tiny_flux_transformer(double=1, single=1, seed=3)
    inputs = transformer_inputs(model, batch=16, seed=1)
    with torch.no_grad():
        velocity = model(**inputs)[0]
    shared = {name: inputs.pop(name) for name in ("img_ids", "txt_ids")}
    inputs.pop("return_dict")
    steps = {name: inputs.pop(name)[:, None] for name in ("hidden_states", "timestep")}
    writer = TrajectoryWriter(folder, {}, {})
    writer.write(0, {**steps, "velocity": velocity[:, None].clone()}, inputs)
    writer.finish(1, shared, {})
    return folder


def distil(data, out, processes, stop=-1, optimizer="adamw"):
    out.mkdir(exist_ok=True)
    script = out.parent / "distil.py"
    script.write_text(SCRIPT)
    arguments = [script, data, out, stop, optimizer]
    if processes > 1:
        ranks = forked.run_ranks(arguments, processes)
    else:
        ranks = [forked.run(arguments, {**os.environ, "OMP_NUM_THREADS": "1"})]
    codes = [rank.poll() for rank in ranks]
    if stop < 0:
        assert codes == [0] * processes, [rank.stderr[-2000:] for rank in ranks]
    else:
        assert 3 in codes, [rank.stderr[-2000:] for rank in ranks]
        assert 0 not in codes
    if stop < 0:
        return json.loads((out / "note.json").read_text()), load_file(out / "student.safetensors")
    return None


@pytest.mark.slow
def test_two_processes_distil_what_one_does(data, tmp_path):
    one, alone = distil(data, tmp_path / "one", 1)
    two, together = distil(data, tmp_path / "two", 2)
    assert (one["world"], two["world"]) == (1, 2)
    assert one["held"] == one["total"] == two["total"]
    assert two["held"] <= 0.51 * two["total"]  # each holds half of the parameters
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    assert one["validation"]["8"] == pytest.approx(two["validation"]["8"], rel=1e-3)
    assert one["validation"]["8"] < one["validation"]["0"]
    moved = 0
    for name, tensor in alone.items():
        if name.endswith("trits"):
            moved += int((tensor != together[name]).sum())
        else:
            torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=1e-4)
    # The order of a sum may tip a latent that stands on a threshold.
    assert moved <= 0.001 * sum(t.numel() for n, t in alone.items() if n.endswith("trits"))
    # Killed, two processes go on to the same bytes, and one process can go on from what two have left.
    distil(data, tmp_path / "cut", 2, stop=5)
    assert (tmp_path / "cut" / "checkpoint.safetensors").is_file()
    shutil.copytree(tmp_path / "cut", tmp_path / "left")
    again, resumed = distil(data, tmp_path / "cut", 2)
    assert again["loss"] == two["loss"]
    assert all(torch.equal(tensor, together[name]) for name, tensor in resumed.items())
    alone_again, _ = distil(data, tmp_path / "left", 1)
    assert alone_again["loss"][:3] == two["loss"][:3]
    assert alone_again["loss"] == pytest.approx(two["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["muon", "lean"])
def test_two_whole_students_learn_what_one_does_by_muon(data, tmp_path, optimizer):
    one, alone = distil(data, tmp_path / "one", 1, optimizer=optimizer)
    two, together = distil(data, tmp_path / "two", 2, optimizer=optimizer)
    assert two["held"] == two["total"]
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-2)  # Muon's products are in bfloat16
    assert two["validation"]["8"] < two["validation"]["0"]
    trits = [name for name in alone if name.endswith("trits")]
    moved = sum(int((alone[n] != together[n]).sum()) for n in trits)
    assert moved <= 0.005 * sum(alone[n].numel() for n in trits)
    distil(data, tmp_path / "cut", 2, stop=5, optimizer=optimizer)
    again, resumed = distil(data, tmp_path / "cut", 2, optimizer=optimizer)
    assert again["loss"] == two["loss"]
    assert all(torch.equal(tensor, together[name]) for name, tensor in resumed.items())


def test_a_batch_that_cannot_be_shared_is_refused():
    assert Ranks().part(torch.arange(3)).tolist() == [0, 1, 2]
    assert Ranks(1, 2).part(torch.arange(4)).tolist() == [2, 3]
    with pytest.raises(ValueError, match="take a multiple"):
        Ranks(0, 2).part(torch.arange(3))
