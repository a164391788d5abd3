"""Transformers of any FLUX.1 config with random weights, made on their device in seconds: for measuring, not drawing.

Speed and memory depend on shapes, not on what the weights say. Rows are scaled so that activations keep an
ordinary size through all blocks; trits are uniform over -1, 0, 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.config import ActivationDtype, Backend, Mode, TernaryConfig
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.formats.packing import packed_width
from tritflow.models.flux1 import is_modulation
from tritflow.modules import FakeTernaryLinear, TernaryLinear, swap_linears_

_SCALE = 1.2  # of a ternary row against K ** -0.5: a third of the trits is zero


def random_dense(config: Mapping[str, Any] = FLUX1_DEV, device: str = "cuda", dtype: torch.dtype | None = None) -> Any:
    """A stock `FluxTransformer2DModel` with Gaussian weights, in eval mode.

    Args:
        config: as in config.json.
        device: where it is made; host memory is not used.
        dtype: bfloat16 by default.
    """
    model = _on_meta(config, dtype)
    model.to_empty(device=device)
    _fill(model)
    return model


def random_ternary(
    config: Mapping[str, Any] = FLUX1_DEV,
    device: str = "cuda",
    *,
    mode: Mode = "w2a8",
    activation_dtype: ActivationDtype = "int8",
    backend: Backend = "auto",
    modulation_device: str | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A `FluxTransformer2DModel` whose block linears are `TernaryLinear`s with random trits, in eval mode.

    Args:
        config: as in config.json.
        device: where it is made; nothing dense of the blocks ever exists.
        mode, activation_dtype, backend: of the ternary layers.
        modulation_device: where the modulation layers end up; they pass through `device` one at a time.
        dtype: of everything else, bfloat16 by default.
    """
    model = _on_meta(config, dtype)
    targets = TernaryConfig()

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return TernaryLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            mode=mode,
            activation_dtype=activation_dtype,
            backend=backend,
            device="meta",
            dtype=linear.weight.dtype,
        )

    replace_(model, lambda name, _: targets.matches(name), make, device, modulation_device)
    return model


def random_student(
    config: Mapping[str, Any],
    device: str,
    *,
    latent_dtype: torch.dtype,
    latent_device: str | None = None,
    activation_bits: int = 16,
) -> Any:
    """A `FluxTransformer2DModel` whose block linears are training twins with random latents; all else is float32.

    Args:
        config: as in config.json.
        device: where it is made; nothing dense of the blocks ever exists.
        latent_dtype, activation_bits: of the twins.
        latent_device: where their latents are (None: as all else).
    """
    model = _on_meta(config, torch.float32)
    targets = TernaryConfig()

    def make(name: str, linear: nn.Linear) -> nn.Module:
        return FakeTernaryLinear(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            activation_bits=activation_bits,
            latent_dtype=latent_dtype,
            device="meta",
        )

    replace_(model, lambda name, _: targets.matches(name), make, device, latent_device=latent_device)
    return model


def replace_(
    model: Any,
    predicate: Callable[[str, nn.Linear], bool],
    make: Callable[[str, nn.Linear], nn.Module],
    device: str = "cuda",
    modulation_device: str | None = None,
    latent_device: str | None = None,
) -> None:
    """Swap linears of a model on the meta device, then give everything random content on `device`.

    Args:
        model: on the meta device; changed in place.
        predicate, make: see `tritflow.modules.swap_linears_`; a replacement that is neither ternary nor an
            `nn.Linear` fills itself in a method `fill_random_()`.
        device: where content is made.
        modulation_device: see `random_ternary`.
        latent_device: where training twins' latents are kept (None: on `device`).
    """
    swap_linears_(model, predicate, make)
    for name, module in model.named_modules():
        if not any(True for _ in itertools.chain(module.parameters(False), module.buffers(False))):
            continue
        module.to_empty(device=device, recurse=False)
        _fill_module(module)
        if modulation_device is not None and is_modulation(name):
            module.to(modulation_device)
        if latent_device is not None and isinstance(module, FakeTernaryLinear):
            module.weight.data = module.weight.data.to(latent_device)


def on_meta(config: Mapping[str, Any] = FLUX1_DEV, dtype: torch.dtype | None = None) -> Any:
    """A stock `FluxTransformer2DModel` without content, in eval mode."""
    return _on_meta(config, dtype)


def _on_meta(config: Mapping[str, Any], dtype: torch.dtype | None) -> Any:
    from diffusers import FluxTransformer2DModel

    settings = {k: v for k, v in config.items() if not k.startswith("_")}
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel(**settings)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16 if dtype is None else dtype)
    return model.eval().requires_grad_(False)


def _fill(model: nn.Module) -> None:
    for module in model.modules():
        _fill_module(module)


@torch.no_grad()
def _fill_module(module: Any) -> None:
    """Random content for one module's own tensors, on the device where they are."""
    if isinstance(module, TernaryLinear):
        module.set_packed_(_random_packed(module.out_features, module.in_features, module.packed.device))
        module.weight_scale.fill_(_SCALE * module.in_features**-0.5)
        if module.input_scale is not None:
            module.input_scale.fill_(1.0)
        if module.bias is not None:
            module.bias.normal_(0, 0.02)
    elif isinstance(module, FakeTernaryLinear):
        if module.moves:
            module.weight.normal_(std=0.7)
        else:
            module.weight.random_(-1, 2)
        module.log_weight_scale.fill_(math.log(_SCALE * module.in_features**-0.5))
        for parameter in (module.log_input_scale, module.bias):
            if parameter is not None:
                parameter.zero_()
    elif hasattr(module, "fill_random_"):
        module.fill_random_()
    else:
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() > 1:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif name == "weight":
                parameter.fill_(1.0)
            else:
                parameter.normal_(0, 0.02)


def _random_packed(rows: int, in_features: int, device: torch.device) -> Tensor:
    """Bytes of four valid codes each; padding is zero."""
    width = packed_width(in_features)
    codes = torch.tensor([0, 1, 3], dtype=torch.uint8)
    table = (codes[:, None, None, None] << 6) | (codes[:, None, None] << 4) | (codes[:, None] << 2) | codes
    packed = table.flatten().to(device)[torch.randint(0, 81, (rows, width), device=device, dtype=torch.int32)]
    tail = in_features % 128
    if tail:
        k = torch.arange(32)
        keep = torch.zeros(32, dtype=torch.uint8)
        for field in range(4):
            keep |= torch.where(32 * field + k < tail, 3 << (2 * field), 0).to(torch.uint8)
        packed[:, -32:] &= keep.to(device)
    return packed
