"""A captured training step, whose teacher runs beside the student, against the same steps one kernel after another."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch

from tritflow.calibration.trajectories import Trajectories, TrajectoryWriter
from tritflow.config import DistillationConfig, TernaryConfig
from tritflow.distillation.compilation import compile_blocks_
from tritflow.distillation.offload import OffloadedLatents
from tritflow.distillation.online import OnlineStates
from tritflow.distillation.parameters import parameter_groups
from tritflow.distillation.state import TrainingState
from tritflow.distillation.step import Step, training_attention
from tritflow.distillation.velocity import distill_
from tritflow.models import FLUX1
from tritflow.models.flux1_training import training_forward
from tritflow.quantization.convert import prepare_
from tritflow.testing import tiny_flux_transformer, transformer_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

STEPS, BATCH = 12, 8
CUDA = torch.device("cuda")


def trajectories(folder: Path) -> Trajectories:
    """Random held-out pairs: something to validate on."""
    model = tiny_flux_transformer(double=2, single=2)
    writer = TrajectoryWriter(folder, {}, {})
    for shard in range(2):
        inputs = transformer_inputs(model, batch=4, seed=shard)
        per_prompt = {n: inputs[n] for n in ("encoder_hidden_states", "pooled_projections", "guidance")}
        steps = {n: inputs[n][:, None].repeat_interleave(2, 1) for n in ("hidden_states", "timestep")}
        steps["velocity"] = torch.randn_like(steps["hidden_states"])
        writer.write(shard, steps, per_prompt)
    writer.finish(2, {n: inputs[n] for n in ("txt_ids", "img_ids")}, {})
    return Trajectories(folder, holdout=0.5)


def trained(folder: Path, *, captured: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Losses, parameters and the pool's states after a few steps by Muon on states that are made meanwhile."""
    teacher = tiny_flux_transformer(double=2, single=2, seed=1).to(CUDA, torch.bfloat16).requires_grad_(False)
    student = tiny_flux_transformer(double=2, single=2, seed=1).to(CUDA)
    prepare_(student, TernaryConfig())
    config = DistillationConfig(
        steps=STEPS, batch_size=BATCH, optimizer="muon", learning_rate=6e-3, rest_learning_rate=3e-4, warmup_steps=1
    )
    inputs = transformer_inputs(teacher, batch=16, dtype=torch.bfloat16)
    states = OnlineStates(
        lambda **kwargs: teacher(**kwargs, return_dict=False)[0],
        {n: inputs[n].to(CUDA) for n in ("encoder_hidden_states", "pooled_projections")},
        {n: inputs[n].to(CUDA) for n in ("txt_ids", "img_ids")},
        torch.linspace(1, 0, 5, device=CUDA)[None],
        [2.0, 4.0],
        tuple(inputs["hidden_states"].shape[1:]),
        batch_size=BATCH,
        batches=3,
        student_share=0.5,
        dtype=torch.bfloat16,
        seed=0,
    )
    with training_attention(CUDA), training_forward(student, teacher):
        result = distill_(
            lambda **kwargs: student(**kwargs, return_dict=False)[0],
            parameter_groups(student, config),
            trajectories(folder / "trajectories"),
            config,
            folder / "out",
            states=states,
            device=CUDA,
            cuda_graph=captured,
        )
    return torch.tensor(result.loss), {n: p.detach() for n, p in student.named_parameters()}, states.state


def test_a_captured_step_is_the_eager_one(tmp_path: Path) -> None:
    losses, parameters, states = trained(tmp_path / "captured", captured=True)
    expected, wanted, there = trained(tmp_path / "eager", captured=False)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=1e-3)
    for name, value in wanted.items():
        # Gradients are summed in any order, and Muon's steps have one size: a few latents may go another way.
        assert float((parameters[name] - value).abs().mean()) < 2e-3, name
    assert torch.equal(states["step"], there["step"])
    torch.testing.assert_close(states["x"], there["x"], rtol=0.05, atol=0.05)


def test_offloaded_latents_train_as_those_on_the_gpu() -> None:
    def run(offloaded: bool) -> tuple[list[float], dict[str, torch.Tensor], set[str]]:
        student = tiny_flux_transformer(double=2, single=2, seed=1).to(CUDA)
        prepare_(student, TernaryConfig(), latent_dtype=torch.bfloat16)
        student.enable_gradient_checkpointing()
        config = DistillationConfig(
            steps=10, optimizer="muon", learning_rate=2e-2, rest_learning_rate=1e-3, warmup_steps=1, lean=True
        )
        inputs = transformer_inputs(student, batch=BATCH, dtype=torch.bfloat16)
        inputs = {n: t.to(CUDA) for n, t in inputs.items() if n != "return_dict"}
        target = torch.randn(inputs["hidden_states"].shape, generator=torch.Generator().manual_seed(3)).to(CUDA)
        losses = []
        with ExitStack() as open_:
            offload = None
            if offloaded:
                offload = open_.enter_context(OffloadedLatents(student, FLUX1.block_order(student.config), CUDA))
            state = TrainingState(parameter_groups(student, config), config, CUDA, offload=offload)
            open_.enter_context(training_attention(CUDA))
            open_.enter_context(training_forward(student))
            step = Step(lambda x: (student(**x, return_dict=False)[0].float() - target).square().mean(), state, 1.0)
            for number in range(config.steps):
                state.set_learning_rates(number)
                losses.append(float(step.eager(inputs)))
            assert state.finite()
            (latents,) = (g.parameters for g in state.groups if g.matrices)
            there = {p.device.type for p in latents.values()} | {m.device.type for _, m in state._muon[0].momenta()}
        return losses, {n: p.detach().float().cpu() for n, p in student.named_parameters()}, there

    expected, wanted, here = run(False)
    losses, found, there = run(True)
    assert (here, there) == ({"cuda"}, {"cpu"})
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-3)
    for name, value in wanted.items():
        assert float((found[name] - value).abs().mean()) < 2e-3, name


@pytest.mark.parametrize("compiled", [False, True])
def test_a_lean_run_learns_as_the_other_does(tmp_path: Path, compiled: bool) -> None:
    def run(lean: bool) -> tuple[list[float], int]:
        teacher = tiny_flux_transformer(double=2, single=2, seed=1).to(CUDA, torch.bfloat16).requires_grad_(False)
        student = tiny_flux_transformer(double=2, single=2, seed=1).to(CUDA)
        prepare_(student, TernaryConfig(), latent_dtype=torch.bfloat16 if lean else torch.float32)
        config = DistillationConfig(
            steps=40, batch_size=BATCH, optimizer="muon", learning_rate=2e-2, warmup_steps=1, lean=lean
        )
        if lean:
            student.enable_gradient_checkpointing()
        inputs = {
            n: t
            for n, t in transformer_inputs(teacher, batch=BATCH, dtype=torch.bfloat16).items()
            if n != "return_dict"
        }
        inputs = {n: t.to(CUDA) for n, t in inputs.items()}
        with torch.no_grad():
            target = teacher(**inputs, return_dict=False)[0].float()
        state = TrainingState(parameter_groups(student, config), config, CUDA)
        losses = []
        with training_attention(CUDA), training_forward(student):
            if compiled:
                compile_blocks_(student)
            step = Step(lambda x: (student(**x, return_dict=False)[0].float() - target).square().mean(), state, 1.0)
            for number in range(config.steps):
                state.set_learning_rates(number)
                losses.append(float(step.eager(inputs)))
        left = sum(p.grad is not None for g in state.groups if g.matrices for p in g.parameters.values())
        return losses, left

    lean, kept = run(True)
    other, _ = run(False)
    assert kept == 0
    assert lean[0] == pytest.approx(other[0], rel=0.05)
    assert lean[-1] < 0.5 * lean[0]
    assert lean[-1] == pytest.approx(other[-1], rel=0.3)
