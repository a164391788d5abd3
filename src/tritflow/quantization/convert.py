"""Dense linears to training twins (`prepare_`) and on to packed layers (`convert_`), in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.config import Ternarizer, TernaryConfig
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.swap import swap_linears_
from tritflow.modules.ternary_linear import TernaryLinear
from tritflow.quantization.rounding import Rounded, round_weight


def prepare_(
    model: nn.Module,
    config: TernaryConfig,
    *,
    ternarizer: Ternarizer = "mse",
    rounded: Mapping[str, Rounded] | None = None,
    activation_bits: int | None = None,
    latent_dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    latent_device: torch.device | None = None,
    weight_of: Callable[[str], Tensor] | None = None,
) -> list[str]:
    """Replace every linear that `config` matches by a `FakeTernaryLinear` that starts from its rounding.

    Args:
        model: changed in place.
        config: which linears; column scales; `w2a8` puts 8-bit activations into the twins.
        ternarizer: how linears are rounded that `rounded` does not name.
        rounded: roundings made elsewhere (error compensation), by module name.
        activation_bits: 8 or 16, overriding the mode.
        latent_dtype: of the twins' latent weights; int8 for trits that stand still.
        device: of the twins (None: each where its linear is).
        latent_device: of their latent weights (None: as the twins).
        weight_of: gives the weight [N, K] of a linear by name where the model's own is on the meta device.

    Returns:
        Names of the replaced linears, in the model's order.

    Raises:
        ValueError: no linear matches, or a rounding does not fit its linear.
    """
    bits = activation_bits if activation_bits is not None else (8 if config.mode == "w2a8" else 16)

    def make(name: str, linear: nn.Linear) -> nn.Module:
        if weight_of is not None:
            linear.weight = nn.Parameter(weight_of(name), requires_grad=False)
        q = _rounding(name, linear, config, ternarizer, rounded)
        twin = twin_of(
            linear,
            q,
            activation_bits=bits,
            activation_dtype=config.activation_dtype,
            latent_dtype=latent_dtype,
            device=device,
        )
        if latent_device is not None:
            twin.weight.data = twin.weight.data.to(latent_device)
        return twin

    return _swap(model, config, make)


def twin_of(linear: nn.Linear, q: Rounded, *, device: torch.device | None = None, **kwargs: Any) -> FakeTernaryLinear:
    """A training twin that computes what `q` stands for, with the dense weight behind.

    Args:
        linear: gives the latent weight, and the bias where `q` has none.
        q: a rounding of it.
        device: of the twin (None: the linear's).
        **kwargs: `activation_bits`, `activation_dtype`, `latent_dtype`.
    """
    device = device or linear.weight.device
    twin = FakeTernaryLinear.from_linear(
        linear,
        q.weight_scale.to(device),
        None if q.input_scale is None else q.input_scale.to(device),
        trits=q.trits.to(device),
        device=device,
        **kwargs,
    )
    if q.bias is not None and twin.bias is not None:
        twin.bias.data.copy_(q.bias)
    return twin


def convert_(
    model: nn.Module,
    config: TernaryConfig,
    *,
    ternarizer: Ternarizer = "mse",
    rounded: Mapping[str, Rounded] | None = None,
) -> list[str]:
    """Replace training twins, and every dense linear that `config` matches, by packed `TernaryLinear`s.

    A twin becomes exactly what it computes; a dense linear is rounded first (`rounded`, or `ternarizer`).

    Returns:
        Names of the replaced modules, in the model's order.

    Raises:
        ValueError: as in `prepare_`.
    """
    settings: dict[str, Any] = {
        "mode": config.mode,
        "activation_dtype": config.activation_dtype,
        "backend": config.backend,
    }
    twins = [name for name, module in model.named_modules() if isinstance(module, FakeTernaryLinear)]
    for name in twins:
        parent, _, leaf = name.rpartition(".")
        twin = model.get_submodule(name)
        assert isinstance(twin, FakeTernaryLinear)
        setattr(model.get_submodule(parent), leaf, twin.to_ternary(**settings))

    def make(name: str, linear: nn.Linear) -> nn.Module:
        q = _rounding(name, linear, config, ternarizer, rounded)
        ternary = TernaryLinear.from_linear(linear, q.trits, q.weight_scale, q.input_scale, **settings)
        if q.bias is not None and ternary.bias is not None:
            ternary.bias.data.copy_(q.bias)
        return ternary

    dense = _swap(model, config, make, required=not twins)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return sorted([*twins, *dense], key=order.__getitem__)


def twin_rounding(twin: FakeTernaryLinear) -> Rounded:
    """What a training twin stands for now, detached."""
    rows, columns = twin.scales()
    return Rounded(
        twin.trits(),
        rows.detach(),
        None if columns is None else columns.detach(),
        None if twin.bias is None else twin.bias.detach(),
    )


def _rounding(
    name: str,
    linear: nn.Linear,
    config: TernaryConfig,
    ternarizer: Ternarizer,
    rounded: Mapping[str, Rounded] | None,
) -> Rounded:
    if rounded is None or name not in rounded:
        return round_weight(linear.weight.detach(), ternarizer, column_scale=config.column_scale)
    q = rounded[name]
    if q.trits.shape != linear.weight.shape:
        raise ValueError(f"the rounding of '{name}' is {list(q.trits.shape)}, its linear {list(linear.weight.shape)}")
    return q


def _swap(model: nn.Module, config: TernaryConfig, make: Any, required: bool = True) -> list[str]:
    names = swap_linears_(model, lambda name, _: config.matches(name), make)
    if required and not names:
        raise ValueError(f"no linear matches targets {list(config.targets)}: nothing to do")
    return names
