import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from tritflow.calibration.trajectories import Trajectories, TrajectoryWriter
from tritflow.config import DistillationConfig
from tritflow.distillation.state import learning_rate_factor
from tritflow.distillation.velocity import DistillationError, ParameterGroup, TrainingState, distill_

CONFIG = DistillationConfig(
    steps=60, batch_size=16, learning_rate=0.05, scale_learning_rate=0.05, warmup_steps=5, checkpoint_every=20
)


class Student(nn.Module):
    """v = (x W + text) * gain: nothing like a FLUX."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(4, 4, generator=g))
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, hidden_states, pooled, timestep):
        return (hidden_states @ self.weight + pooled[:, None] * timestep[:, None, None]) * self.gain

    def groups(self):
        return [
            ParameterGroup("weights", {"weight": self.weight}, 0.05),
            ParameterGroup("scales", {"gain": self.gain}, 0.01),
        ]


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "t"
    writer = TrajectoryWriter(folder, {}, {})
    teacher = Student(seed=1)
    g = torch.Generator().manual_seed(2)
    for shard in range(2):
        x = torch.randn(8, 5, 3, 4, generator=g)
        pooled, time = torch.randn(8, 4, generator=g), torch.rand(8, 5, generator=g)
        with torch.no_grad():
            flat = teacher(x.flatten(0, 1), pooled.repeat_interleave(5, 0), time.flatten())
        steps = {"hidden_states": x, "timestep": time, "velocity": flat.reshape(8, 5, 3, 4)}
        writer.write(shard, steps, {"pooled": pooled})
    writer.finish(2, {}, {})
    return Trajectories(folder, holdout=0.2)


def run(trajectories, out, config=CONFIG, on_progress=None, identity=None):
    student = Student()
    result = distill_(student, student.groups(), trajectories, config, out, on_progress=on_progress, identity=identity)
    return student, result


def test_it_learns_the_teacher(trajectories, tmp_path):
    student, result = run(trajectories, tmp_path)
    assert list(result.validation) == [0, 20, 40, 60]
    assert result.validation[60] < 0.05 * result.validation[0]
    assert len(result.loss) == 60
    curve = json.loads((tmp_path / "curve.json").read_text())
    assert curve["validation_mse"]["60"] == result.validation[60]
    assert curve["config_hash"] == CONFIG.hash
    assert not torch.equal(student.gain, torch.ones(4))


def test_killed_and_resumed_gives_the_same_bytes(trajectories, tmp_path):
    whole, result = run(trajectories, tmp_path / "whole")

    def kill(step, steps, loss):
        if step >= 47:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(trajectories, tmp_path / "cut", on_progress=kill)
    seen = []
    again, resumed = run(trajectories, tmp_path / "cut", on_progress=lambda s, n, loss: seen.append(s))
    assert seen[0] == 41
    for name in ("checkpoint.safetensors", "curve.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    assert torch.equal(whole.weight, again.weight)
    assert resumed == result
    finished, third = run(trajectories, tmp_path / "cut", on_progress=lambda *a: pytest.fail("it was done"))
    assert torch.equal(whole.weight, finished.weight)
    assert third == result


def test_another_run_or_damage_is_refused(trajectories, tmp_path):
    run(trajectories, tmp_path, identity={"teacher": "a"})
    with pytest.raises(DistillationError, match="another run"):
        run(trajectories, tmp_path, identity={"teacher": "b"})
    path = tmp_path / "checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        run(trajectories, tmp_path, identity={"teacher": "a"})


def test_divergence_is_an_error(trajectories, tmp_path):
    student = Student()
    with torch.no_grad():
        student.weight.fill_(float("nan"))
    with pytest.raises(DistillationError, match=r"the loss is nan at step 1\b"):
        distill_(student, student.groups(), trajectories, CONFIG, tmp_path)


@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 0.05), ("muon", 0.3)])
def test_both_optimizers_learn_and_resume_to_the_same_bytes(trajectories, tmp_path, optimizer, rate):
    config = dataclasses.replace(CONFIG, optimizer=optimizer)

    def groups(student):
        return [
            ParameterGroup("weights", {"weight": student.weight}, rate, matrices=True),
            ParameterGroup("scales", {"gain": student.gain}, 0.01),
        ]

    def kill(step, steps, loss):
        if step >= 33:
            raise KeyboardInterrupt

    whole, cut, again = Student(), Student(), Student()
    result = distill_(whole, groups(whole), trajectories, config, tmp_path / "whole")
    assert result.validation[60] < 0.05 * result.validation[0]
    with pytest.raises(KeyboardInterrupt):
        distill_(cut, groups(cut), trajectories, config, tmp_path / "cut", on_progress=kill)
    distill_(again, groups(again), trajectories, config, tmp_path / "cut")
    assert torch.equal(whole.weight, again.weight)
    assert torch.equal(whole.gain, again.gain)


def test_schedule():
    config = DistillationConfig(steps=100, warmup_steps=10)
    factors = [learning_rate_factor(i, config) for i in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] > 0.97
    assert factors[-1] < 0.001
    assert math.isclose(learning_rate_factor(50, config), 0.5)


def test_trits_stand_still_at_the_end(trajectories, tmp_path):
    config = dataclasses.replace(CONFIG, freeze_share=1 / 3)
    factors = [learning_rate_factor(i, config, share=2 / 3) for i in range(60)]
    assert factors[20] == pytest.approx(0.5)
    assert factors[39] < 0.01
    assert not any(factors[40:])
    student = Student()
    groups = [dataclasses.replace(g, matrices=g.name == "weights") for g in student.groups()]
    seen = {}

    def look(step, steps, loss):
        seen[step] = student.weight.detach().clone(), student.gain.detach().clone()

    distill_(student, groups, trajectories, config, tmp_path / "run", on_progress=look)
    assert not torch.equal(seen[30][0], seen[40][0])
    assert torch.equal(seen[40][0], student.weight)
    assert not torch.equal(seen[40][1], student.gain)


def test_groups_are_checked():
    student = Student()
    twice = [ParameterGroup("a", {"w": student.weight}, 1.0), ParameterGroup("b", {"w": student.gain}, 1.0)]
    with pytest.raises(ValueError, match="'w' is in two groups"):
        TrainingState(twice, CONFIG, torch.device("cpu"))
    with pytest.raises(ValueError, match="nothing to train"):
        TrainingState([ParameterGroup("a", {}, 1.0)], CONFIG, torch.device("cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graph_equals_eager(trajectories, tmp_path):
    results = []
    for graph in (False, True):
        student = Student().cuda()
        r = distill_(
            student, student.groups(), trajectories, CONFIG, tmp_path / str(graph), device="cuda", cuda_graph=graph
        )
        results.append((student.weight.detach().cpu(), r.validation[60]))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-3, atol=1e-4)
    assert results[1][1] < 1e-2


class Breaking(Student):
    """Breaks at given forward passes of the training: as a run does that leaves its valley."""

    def __init__(self, at, by=math.nan):
        super().__init__()
        self.at, self.by, self.calls = at, by, 0

    def forward(self, *args, **kwargs):
        if torch.is_grad_enabled():
            self.calls += 1
            if self.calls in self.at:
                with torch.no_grad():
                    self.weight.add_(self.by)
        return super().forward(*args, **kwargs)


def distil(student, trajectories, out, **settings):
    return distill_(student, student.groups(), trajectories, dataclasses.replace(CONFIG, **settings), out)


@pytest.mark.parametrize("by", [math.nan, 30.0])
def test_a_run_that_diverges_goes_back_to_its_best_with_half_the_rate(trajectories, tmp_path, by):
    # It comes right again by itself where it has the steps for it, so it breaks just before it is looked at.
    student = Breaking({39}, by)
    with pytest.warns(UserWarning, match=r"goes back to step 20 with 0\.5 of the rate"):
        result = distil(student, trajectories, tmp_path)
    assert [(r["to"], r["last"]) for r in result.retreats] == [(20, False)]
    assert result.validation[60] < 0.1 * result.validation[0]
    assert json.loads((tmp_path / "curve.json").read_text())["retreats"] == result.retreats
    # Finished, it is known to have gone back.
    again = distil(Breaking(set()), trajectories, tmp_path)
    assert again == result


def test_a_run_that_always_diverges_ends_with_its_best(trajectories, tmp_path):
    student = Breaking(set(range(30, 500)))
    with pytest.warns(UserWarning, match="ends there"):
        result = distil(student, trajectories, tmp_path)
    assert [r["last"] for r in result.retreats] == [False, False, True]
    assert result.steps == len(result.loss) == 20
    assert max(result.validation) == 20
    assert bool(torch.isfinite(student.weight).all())
    with torch.no_grad():
        fresh = Breaking(set())
        assert distil(fresh, trajectories, tmp_path) == result
        assert torch.equal(fresh.weight, student.weight)


def test_a_run_may_be_told_not_to_go_back(trajectories, tmp_path):
    with pytest.warns(UserWarning, match="ends there"):
        result = distil(Breaking({39}), trajectories, tmp_path, retreats=0)
    assert result.steps == 20
