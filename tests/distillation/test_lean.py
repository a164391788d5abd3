import copy

import pytest
import torch
from torch import nn

from tritflow.config import DistillationConfig
from tritflow.distillation.lean import LeanMuon, put_stochastic_
from tritflow.distillation.muon import Muon
from tritflow.distillation.parameters import parameter_groups
from tritflow.distillation.state import TrainingState
from tritflow.distillation.step import Step
from tritflow.modules.fake import FakeTernaryLinear

CONFIG = DistillationConfig(steps=4, optimizer="muon", learning_rate=0.05, warmup_steps=0, lean=True)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_rounding_by_chance_is_right_on_average_and_never_further_than_a_neighbour():
    value = torch.tensor([1.0, 1.001, -0.3337, 1e-6, 0.0]).repeat(100_000, 1)
    into = torch.empty_like(value, dtype=torch.bfloat16)
    put_stochastic_(into, value, generator())
    torch.testing.assert_close(into.float().mean(0), value[0], rtol=1e-4, atol=0)
    assert [len(column.unique()) for column in into.float().T] == [1, 2, 2, 2, 1]  # 1 and 0 are bf16 themselves
    assert (into.float() / value).nan_to_num(1).sub(1).abs().max() < 2**-7
    again = torch.empty_like(into)
    put_stochastic_(again, value, generator())
    assert torch.equal(again, into)


def test_steps_are_muons_up_to_the_rounding():
    torch.manual_seed(0)
    start, rate = torch.randn(24, 16).bfloat16().float(), torch.tensor(0.5)
    exact, factor = nn.Parameter(start.clone()), torch.linspace(0.2, 1, 16)
    lean = nn.Parameter(start.bfloat16())
    plain = Muon([exact], rate, weight_decay=0.1, factors={id(exact): factor})
    hooked = LeanMuon([lean], rate, weight_decay=0.1, factors={id(lean): factor})
    for number in range(5):
        target = torch.randn(24, 16)
        exact.grad = 2 * (exact.detach() - target)
        plain.step()
        hooked.begin(number)
        (lean.float() - target).square().sum().backward()
        assert lean.grad is None  # stepped and forgotten within the backward pass
    moved = (exact - start).square().mean().sqrt()
    assert (lean.float() - exact).square().mean().sqrt() < 0.02 * moved
    assert (hooked.momenta()[0][1].float() - plain.momenta()[0][1]).abs().max() < 0.1


def test_closed_it_leaves_gradients_alone():
    weight = nn.Parameter(torch.randn(4, 3).bfloat16())
    before = weight.detach().clone()
    LeanMuon([weight], torch.tensor(0.5)).close()
    weight.float().square().sum().backward()
    assert torch.equal(weight, before)
    assert weight.grad is not None


def test_float32_matrices_and_vectors_are_refused():
    for wrong in (torch.zeros(3, 3), torch.zeros(3, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="bfloat16 matrices"):
            LeanMuon([nn.Parameter(wrong)], torch.tensor(0.1))


def model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(*(FakeTernaryLinear(16, 16, latent_dtype=torch.bfloat16) for _ in range(3)))
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.5)
    return layers


def trained(layers: nn.Module, numbers: range, state: TrainingState) -> None:
    inputs = {"x": torch.randn(8, 16, generator=generator(1))}
    target = torch.randn(8, 16, generator=generator(2))
    step = Step(lambda batch: (layers(batch["x"]) - target).square().mean(), state, 1.0)
    for number in numbers:
        state.set_learning_rates(number)
        state.losses[number] = step.eager(inputs)


def test_a_resumed_run_rounds_as_it_would_have(tmp_path):
    whole, parts = model(), model()
    state = TrainingState(parameter_groups(whole, CONFIG), CONFIG, torch.device("cpu"))
    before = copy.deepcopy(whole)
    trained(whole, range(4), state)
    assert any((a.trits() != b.trits()).any() for a, b in zip(before, whole, strict=True))
    assert all(layer.weight.grad is None for layer in whole)
    first = TrainingState(parameter_groups(parts, CONFIG), CONFIG, torch.device("cpu"))
    trained(parts, range(2), first)
    first.save(tmp_path, {"job": 1}, 2, {})
    other = model()
    second = TrainingState(parameter_groups(other, CONFIG), CONFIG, torch.device("cpu"))
    assert second.load(tmp_path, {"job": 1}).step == 2
    trained(other, range(2, 4), second)
    for a, b in zip(whole.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
