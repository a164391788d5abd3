"""What of a prepared student is trained, and at which rate."""

from __future__ import annotations

from torch import nn

from tritflow.config import DistillationConfig
from tritflow.distillation.state import ParameterGroup
from tritflow.modules.fake import FakeTernaryLinear


def parameter_groups(model: nn.Module, config: DistillationConfig) -> list[ParameterGroup]:
    """Latent weights, scales and biases of all training twins; everything else is frozen, in place.

    Raises:
        ValueError: the model has no `FakeTernaryLinear`; call `prepare_` first.
    """
    twins = {n: m for n, m in model.named_modules() if isinstance(m, FakeTernaryLinear)}
    if not twins:
        raise ValueError("the model holds no FakeTernaryLinear: call prepare_ before distilling")
    model.requires_grad_(False)
    latents: dict[str, nn.Parameter] = {}
    scales: dict[str, nn.Parameter] = {}
    biases: dict[str, nn.Parameter] = {}
    for name, twin in twins.items():
        latents[f"{name}.weight"] = twin.weight
        if config.train_scales:
            scales[f"{name}.log_weight_scale"] = twin.log_weight_scale
            if twin.log_input_scale is not None:
                scales[f"{name}.log_input_scale"] = twin.log_input_scale
        if config.train_biases and twin.bias is not None:
            biases[f"{name}.bias"] = twin.bias
    for parameter in [*latents.values(), *scales.values(), *biases.values()]:
        parameter.requires_grad_(True)
    return [
        ParameterGroup("latent weights", latents, config.learning_rate, config.weight_decay),
        ParameterGroup("scales", scales, config.scale_learning_rate),
        ParameterGroup("biases", biases, config.scale_learning_rate),
    ]
