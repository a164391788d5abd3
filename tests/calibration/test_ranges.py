import pytest
import torch
from torch import nn

from tritflow.calibration.ranges import input_ranges, read_ranges, write_ranges
from tritflow.calibration.trajectories import Trajectories, TrajectoryWriter


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, hidden_states):
        return self.second(torch.relu(self.first(hidden_states)))


@pytest.fixture
def trajectories(tmp_path):
    writer = TrajectoryWriter(tmp_path / "t", {}, {})
    x = torch.randn(5, 4, 3, 6, generator=torch.Generator().manual_seed(0))
    writer.write(0, {"hidden_states": x, "velocity": x.clone()}, {})
    writer.finish(1, {}, {})
    return Trajectories(tmp_path / "t", holdout=0)


def test_ranges_are_those_of_all_inputs_however_they_are_batched(trajectories):
    model = Model()
    found = input_ranges(model, model, ["first", "second"], trajectories, samples=99, batch_size=7)
    x = trajectories.pairs(torch.arange(20)).kwargs["hidden_states"].flatten(0, -2)
    inner = torch.relu(model.first(x)).detach()
    for name, inputs in (("first", x), ("second", inner)):
        torch.testing.assert_close(found[name].amax, inputs.abs().amax(0))
        torch.testing.assert_close(found[name].mean_square, inputs.square().mean(0))
    assert not model.first._forward_pre_hooks


def test_a_linear_that_never_runs_is_named(trajectories):
    model = Model()
    with pytest.raises(ValueError, match="'idle' never ran"):
        input_ranges(model, model, ["first", "idle"], trajectories, samples=4, batch_size=4)


def test_files_are_of_one_job(trajectories, tmp_path):
    model, path = Model(), tmp_path / "ranges.safetensors"
    assert read_ranges(path, "a") is None
    found = input_ranges(model, model, ["first"], trajectories, samples=4, batch_size=4)
    write_ranges(path, found, "a")
    assert read_ranges(path, "b") is None
    assert torch.equal(read_ranges(path, "a")["first"].amax, found["first"].amax)
    path.write_bytes(path.read_bytes()[:50])
    assert read_ranges(path, "a") is None
