"""A training student of any FLUX.1's shapes with random trits, for measurements of time and memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tritflow.config import DistillationConfig
from tritflow.distillation.parameters import rest_parameters
from tritflow.models import FLUX1
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.swap import swap_linears_
from tritflow.pipelines.synthetic import on_meta


def random_student(config: Mapping[str, Any], device: torch.device, settings: DistillationConfig) -> Any:
    """A student of the config's shapes, made on the device without ever being dense."""
    inside = set(FLUX1.block_linears(config))
    dtype = torch.bfloat16 if settings.lean else torch.float32
    if not settings.learning_rate:
        dtype = torch.int8  # trits that stand still

    def make(name: str, linear: Any) -> FakeTernaryLinear:
        twin = FakeTernaryLinear(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            activation_bits=settings.activation_bits,
            latent_dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            if twin.moves:
                twin.weight.normal_(std=0.7)
            else:
                twin.weight.random_(-1, 2)
            twin.log_weight_scale.fill_(-0.5 * torch.log(torch.tensor(0.5 * linear.in_features)))
        return twin

    model = on_meta(config)
    swap_linears_(model, lambda name, _: name in inside, make)
    rest = {}
    for name, parameter in rest_parameters(model):
        value = torch.zeros(parameter.shape, device=device)
        if parameter.ndim > 1:
            value.normal_(std=parameter.shape[1] ** -0.5)
        elif "norm_" in name and name.endswith("weight"):
            value.fill_(1.0)
        rest[name] = value
    model.load_state_dict(rest, assign=True, strict=False)
    if settings.lean:
        model.enable_gradient_checkpointing()
    return model
