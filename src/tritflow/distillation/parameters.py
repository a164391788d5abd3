"""What of a prepared student is trained, and at which rate."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tritflow.config import DistillationConfig
from tritflow.distillation.state import ParameterGroup
from tritflow.modules.fake import FakeTernaryLinear


def latent_dtype(config: DistillationConfig) -> torch.dtype:
    """Of the twins' latent weights: int8 where trits stand still, bf16 where they are lean."""
    if not config.learning_rate:
        return torch.int8
    return torch.bfloat16 if config.lean else torch.float32


def parameter_groups(model: nn.Module, config: DistillationConfig) -> list[ParameterGroup]:
    """Latent weights, scales and biases of all training twins, and the rest of the model if the config gives it a rate;
    everything else is frozen, in place.

    Raises:
        ValueError: the model has no `FakeTernaryLinear`; call `prepare_` first.
    """
    twins = {n: m for n, m in model.named_modules() if isinstance(m, FakeTernaryLinear)}
    if not twins:
        raise ValueError("the model holds no FakeTernaryLinear: call prepare_ before distilling")
    model.requires_grad_(False)
    latents: dict[str, nn.Parameter] = {}
    factors: dict[str, Tensor] = {}
    scales: dict[str, nn.Parameter] = {}
    columns: dict[str, nn.Parameter] = {}
    biases: dict[str, nn.Parameter] = {}
    for name, twin in twins.items():
        if twin.moves and config.learning_rate > 0:
            latents[f"{name}.weight"] = twin.weight
        columns_now = twin.scales()[1]
        if f"{name}.weight" in latents and config.damp_columns and columns_now is not None:
            factors[f"{name}.weight"] = columns_now.detach().reciprocal().clamp_max(1.0)
        if config.train_scales:
            scales[f"{name}.log_weight_scale"] = twin.log_weight_scale
            if twin.log_input_scale is not None and config.column_learning_rate > 0:
                columns[f"{name}.log_input_scale"] = twin.log_input_scale
        if config.train_biases and twin.bias is not None:
            biases[f"{name}.bias"] = twin.bias
    rest = dict(rest_parameters(model)) if config.rest_learning_rate > 0 else {}
    for parameter in [*latents.values(), *scales.values(), *columns.values(), *biases.values(), *rest.values()]:
        parameter.requires_grad_(True)
    return [
        ParameterGroup(
            "latent weights", latents, config.learning_rate, config.weight_decay, matrices=True, factors=factors
        ),
        ParameterGroup("scales", scales, config.scale_learning_rate),
        ParameterGroup("column scales", columns, config.column_learning_rate),
        ParameterGroup("biases", biases, config.scale_learning_rate),
        ParameterGroup("rest", rest, config.rest_learning_rate),
    ]


def rest_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by name that belong to no training twin: embedders, norms, output layer, layers left dense."""
    twins = tuple(f"{n}." for n, m in model.named_modules() if isinstance(m, FakeTernaryLinear))
    return ((n, p) for n, p in model.named_parameters() if not n.startswith(twins))
