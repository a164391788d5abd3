from contextlib import closing, nullcontext

import pytest
import torch
from torch import nn

from tritflow.config import DistillationConfig, TernaryConfig
from tritflow.distillation.compilation import compile_blocks_
from tritflow.distillation.offload import OffloadedLatents
from tritflow.distillation.parameters import parameter_groups
from tritflow.distillation.state import TrainingState
from tritflow.distillation.step import Step, training_attention
from tritflow.models import FLUX1
from tritflow.models.flux1_training import training_forward
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.quantization.convert import prepare_
from tritflow.testing import tiny_flux_transformer, transformer_inputs

CPU = torch.device("cpu")
CONFIG = DistillationConfig(
    steps=4, optimizer="muon", learning_rate=0.05, rest_learning_rate=1e-3, warmup_steps=0, lean=True
)


def student() -> nn.Module:
    model = tiny_flux_transformer(double=2, single=2)
    prepare_(model, TernaryConfig(), latent_dtype=torch.bfloat16)
    model.enable_gradient_checkpointing()
    return model


def offloaded(model: nn.Module) -> OffloadedLatents:
    return OffloadedLatents(model, FLUX1.block_order(model.config), CPU)


def latents(model: nn.Module) -> list[nn.Parameter]:
    return [m.weight for m in model.modules() if isinstance(m, FakeTernaryLinear)]


def step_of(model: nn.Module, state: TrainingState) -> tuple[Step, dict[str, torch.Tensor]]:
    inputs = {n: t for n, t in transformer_inputs(model, batch=3).items() if isinstance(t, torch.Tensor)}
    target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(1))

    def loss(batch):
        return (model(**batch, return_dict=False)[0].float() - target).square().mean()

    return Step(loss, state, 1.0), inputs


def trained(model: nn.Module, state: TrainingState, numbers: range) -> list[float]:
    step, inputs = step_of(model, state)
    losses = []
    with training_attention(CPU), training_forward(model):
        for number in numbers:
            state.set_learning_rates(number)
            losses.append(float(step.eager(inputs)))
    return losses


@pytest.mark.parametrize("compiled", [False, True])
def test_training_is_the_same_to_the_last_bit(compiled):
    here, away = student(), student()
    begin = [p.detach().clone() for p in latents(here)]
    expected = trained(here, TrainingState(parameter_groups(here, CONFIG), CONFIG, CPU), range(4))
    with offloaded(away) as offload:
        state = TrainingState(parameter_groups(away, CONFIG), CONFIG, CPU, offload=offload)
        if compiled:
            compile_blocks_(away, backend="eager")
        assert trained(away, state, range(4)) == expected
        assert state.finite()
    assert expected[-1] < expected[0]
    assert all((p != q).any() for p, q in zip(latents(here), begin, strict=True))
    for (name, p), q in zip(here.named_parameters(), away.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_one_blocks_latents_are_on_the_device_and_the_nexts_are_coming():
    model, most, coming = student(), 0, []
    offload = offloaded(model)
    bring = offload._bus.bring
    offload._bus.bring = lambda homes: coming.append(len(homes)) or bring(homes)
    homes = {id(p): p.data_ptr() for p in latents(model)}
    blocks = [[id(p) for p in latents(model.get_submodule(n))] for n in FLUX1.block_order(model.config)]

    def away() -> list[int]:
        return [
            i
            for i, ids in enumerate(blocks)
            if any(p.data_ptr() != homes[id(p)] for p in latents(model) if id(p) in ids)
        ]

    def watch(*args):
        nonlocal most
        most = max(most, len(away()))

    for twin in (m for m in model.modules() if isinstance(m, FakeTernaryLinear)):
        twin.register_forward_pre_hook(watch)
    for p in latents(model):
        p.requires_grad_(True)
        p.register_post_accumulate_grad_hook(watch)
    state = TrainingState(parameter_groups(model, CONFIG), CONFIG, CPU, offload=offload)
    trained(model, state, range(1))
    assert most == 1
    assert away() == []
    sizes = [len(ids) for ids in blocks]
    # Each block once forward, and once for its gradients, with its momenta; nothing is brought in vain.
    assert coming == [*sizes, *(2 * n for n in reversed(sizes))]
    assert offload._next is None
    with torch.no_grad():
        step_of(model, state)[0].loss(step_of(model, state)[1])
    assert away() == []
    assert coming[2 * len(sizes) :] == sizes


def test_a_forward_that_broke_off_is_forgotten():
    model = student()
    offload = offloaded(model)
    state = TrainingState(parameter_groups(model, CONFIG), CONFIG, CPU, offload=offload)
    second = model.get_submodule(FLUX1.block_order(model.config)[1])
    handle = second.register_forward_pre_hook(lambda *_: pytest.fail("stop"))
    with pytest.raises(pytest.fail.Exception, match="stop"):
        trained(model, state, range(1))
    handle.remove()
    offload.settle()
    assert offload._next is None
    assert all(p.data_ptr() == offload._homes[id(p)].data_ptr() for p in latents(model))
    assert len(trained(model, state, range(1))) == 1


@pytest.mark.parametrize("away", [False, True])
def test_training_that_broke_off_begins_anew(away):
    """As where the compiler of a machine fails in the first forward pass, or in one that runs for its gradients."""
    here, again = student(), student()
    expected = trained(here, TrainingState(parameter_groups(here, CONFIG), CONFIG, CPU), range(2))
    last = again.get_submodule(FLUX1.block_order(again.config)[-1])
    with offloaded(again) if away else nullcontext() as offload:
        for backward in (False, True):

            def broken(*_, backward=backward):
                assert (torch._C._current_graph_task_id() != -1) != backward, "stop"

            handle = last.register_forward_pre_hook(broken)
            state = TrainingState(parameter_groups(again, CONFIG), CONFIG, CPU, offload=offload)
            with closing(state), pytest.raises(AssertionError, match="stop"):
                trained(again, state, range(1))
            handle.remove()
        homes = None if offload is None else dict(offload._momenta)
        state = TrainingState(parameter_groups(again, CONFIG), CONFIG, CPU, offload=offload)
        assert trained(again, state, range(2)) == expected
        assert offload is None or {n: m.data_ptr() for n, m in offload._momenta.items()} == {
            n: m.data_ptr() for n, m in homes.items()
        }
    for p, q in zip(here.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_latent_without_a_gradient_goes_home_as_it_came():
    model = student()
    offload = offloaded(model)
    for p in latents(model):
        p.requires_grad_(True)
    (first, *_) = latents(model)
    before = first.detach().clone()
    offload._fetch(0)
    assert first.data_ptr() != offload._homes[id(first)].data_ptr()
    offload.settle()
    assert first.data_ptr() == offload._homes[id(first)].data_ptr()
    assert torch.equal(first, before)


def test_closed_it_leaves_nothing_behind():
    model = student()
    with pytest.raises(RuntimeError, match="stop"), offloaded(model) as offload:
        raise RuntimeError("stop")
    assert not offload._handles
    for name in FLUX1.block_order(model.config):
        block = model.get_submodule(name)
        assert not block._forward_pre_hooks
        assert not block._forward_hooks


def test_a_checkpoint_goes_on_with_or_without(tmp_path):
    whole, first, second = student(), student(), student()
    trained(whole, TrainingState(parameter_groups(whole, CONFIG), CONFIG, CPU), range(4))
    with offloaded(first) as offload:
        state = TrainingState(parameter_groups(first, CONFIG), CONFIG, CPU, offload=offload)
        trained(first, state, range(2))
        state.save(tmp_path, {"job": 1}, 2, {})
    state = TrainingState(parameter_groups(second, CONFIG), CONFIG, CPU)
    assert state.load(tmp_path, {"job": 1}).step == 2
    trained(second, state, range(2, 4))
    with offloaded(third := student()) as offload:
        state = TrainingState(parameter_groups(third, CONFIG), CONFIG, CPU, offload=offload)
        assert state.load(tmp_path, {"job": 1}).step == 2
        trained(third, state, range(2, 4))
    for model in (second, third):
        for p, q in zip(whole.parameters(), model.parameters(), strict=True):
            assert torch.equal(p, q)
