"""FLUX.1's attention in training: the same velocities and gradients as by diffusers' own processor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.embeddings import apply_rotary_emb
from torch import nn

from tritflow.config import TernaryConfig
from tritflow.models.flux1_training import TrainingAttention, joined, rotated, training_forward
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.quantization.convert import prepare_
from tritflow.testing import tiny_flux_transformer, transformer_inputs


def gradients(model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    velocity = model(**inputs)[0]
    velocity.square().sum().backward()
    return velocity.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("student", ["dense", "ternary", "8 bits", "column scales"])
def test_velocities_and_gradients_are_the_same(student: str) -> None:
    model = tiny_flux_transformer(double=2, single=2).requires_grad_(True)
    if student != "dense":
        config = TernaryConfig(column_scale=student == "column scales")
        prepare_(model, config, activation_bits=8 if student == "8 bits" else 16)
    inputs = transformer_inputs(model)
    wanted, expected = gradients(model, inputs)
    before = [m.processor for m in model.modules() if hasattr(m, "processor")]
    with training_forward(model):
        assert all(type(m.processor) is TrainingAttention for m in model.modules() if hasattr(m, "processor"))
        velocity, found = gradients(model, inputs)
    assert [m.processor for m in model.modules() if hasattr(m, "processor")] == before
    torch.testing.assert_close(velocity, wanted, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max() + 1), msg=name
        )


def test_rotation_is_diffusers_own_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 3, 8, generator=generator).bfloat16()
    angle = torch.randn(5, 4, generator=generator).repeat_interleave(2, dim=1)
    cos, sin = angle.cos(), angle.sin()
    assert torch.equal(rotated(x, cos, sin), apply_rotary_emb(x, (cos, sin), sequence_dim=1))


def test_only_layers_that_are_alike_are_joined() -> None:
    class Own(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) + 1

    x = torch.randn(3, 6)
    for layers in (
        [nn.Linear(6, 4), nn.Linear(6, 2)],
        [nn.Linear(6, 4, bias=False), nn.Linear(6, 2, bias=False)],
        [nn.Linear(6, 4), Own(6, 2)],
        [FakeTernaryLinear(6, 4), nn.Linear(6, 2)],
    ):
        for made, layer in zip(joined(layers, x), layers, strict=True):
            torch.testing.assert_close(made, layer(x))


def test_other_processors_stay() -> None:
    model = tiny_flux_transformer()

    class Own:
        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    own = Own()
    model.transformer_blocks[0].attn.processor = own
    with training_forward(model, nn.Linear(2, 2)):
        assert model.transformer_blocks[0].attn.processor is own
        assert type(model.single_transformer_blocks[0].attn.processor) is TrainingAttention
