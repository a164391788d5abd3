"""LoRA adapters as peft loads them, as the two factors that a fused product adds: y + up (down x).

peft wraps a linear layer and keeps named adapters beside it: `B (A x)` times a scaling, for every active name. Here the
active ones of several layers that are one product become one pair of factors, scaling included. Nothing is imported of
peft: its layers are known by their attributes, and whatever is more than such a sum is named by `why_not`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = ("peft.tuners.lora.layer", "tritflow.pipelines.lora_layer")
_UNIT = 16  # ranks are padded with zeros to a multiple of it, see `tritflow.kernels.low_rank_op`

Factors = tuple[Tensor, Tensor, float]
"""A [r, K], B [N, r] and the scaling of their product."""


def is_adapted(module: object) -> bool:
    """Whether a module is one of peft's layers, or derived from one."""
    return _of_peft(type(module))  # type: ignore[arg-type]  # classes are hashable, whatever the stub thinks


@cache
def _of_peft(kind: type) -> bool:
    return any(base.__module__.startswith("peft.") for base in kind.__mro__)


def base_of(linear: Any) -> Any:
    """The layer itself under peft's, or `linear` where there is none of peft's."""
    return linear.get_base_layer() if is_adapted(linear) else linear


def why_not(layer: Any) -> str | None:
    """Why a layer of peft's is more than `y + scaling * B(A(x))`, in a few words; None if it is not."""
    kind = type(layer)
    if kind.__module__ not in _PLAIN or not isinstance(base_of(layer), nn.Linear):
        return f"an adapter that is no plain LoRA is loaded ({kind.__name__})"
    if layer.merged:
        return "a LoRA was merged into the weight"
    for name in _active(layer):
        down, up = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant:
            return f"LoRA '{name}' is a variant ({type(layer.lora_variant[name]).__name__})"
        if type(down) is not nn.Linear or type(up) is not nn.Linear:
            return f"LoRA '{name}' is made of {type(down).__name__}"
        if down.bias is not None or up.bias is not None:
            return f"LoRA '{name}' has a bias"
    return None


def _active(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def factors(linear: Any) -> list[Factors]:
    """What the active adapters of a layer add to it; none for a layer that is not peft's."""
    if not is_adapted(linear):
        return []
    found = [(linear.lora_A[n].weight, linear.lora_B[n].weight, float(linear.scaling[n])) for n in _active(linear)]
    return [f for f in found if f[2] != 0]


def version(tensor: Tensor) -> int:
    """How often a tensor was written to in place, as far as PyTorch counts it."""
    return 0 if tensor.is_inference() else tensor._version


def stamp(layer: Any) -> tuple[Any, ...]:
    """What `factors` of a layer of peft's rests on; changes with names, weights, switches, and writes in place."""
    # Read at every step, so from the dictionaries: nn.Module's look-ups would take three times as long.
    active, modules = layer._active_adapter, layer._modules
    found = [
        layer._disable_adapters,
        active if isinstance(active, str) else tuple(active),
        len(layer.merged_adapters),
        *layer.scaling.values(),
    ]
    for part in ("lora_A", "lora_B"):
        for module in modules[part]._modules.values():
            weight = module._parameters.get("weight")
            if weight is not None:
                found += (weight.data_ptr(), version(weight))
    return tuple(found)


class LowRank:
    """The adapters of layers whose outputs are one product, as one pair of factors.

    Layers with as many rows each keep columns of their own in `down`'s output, and their rows of `up` [N, R] meet only
    those; layers of different sizes share R columns, with zeros where one's rows meet another's columns.

    Args:
        linears: in the order of their outputs; at least one with `factors`.
        input_scale: [K] by which the rows were multiplied when they were quantized, or None.
    """

    def __init__(self, linears: Sequence[Any], input_scale: Tensor | None = None) -> None:
        self.parts = [factors(linear) for linear in linears]
        self.sizes = [base_of(linear).out_features for linear in linears]
        self.input_scale = input_scale
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    @classmethod
    def of(cls, linears: Sequence[Any], input_scale: Tensor | None = None) -> LowRank | None:
        """None where no layer has an active adapter."""
        low = cls(linears, input_scale)
        return low if any(low.parts) else None

    def made(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """down [S * R, K] and up [N, R] in `dtype`, made at the first call; one rounding each."""
        if dtype not in self._made:
            self._made[dtype] = self._make(dtype)
        return self._made[dtype]

    def _make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        ranks = [sum(a.shape[0] for a, _, _ in part) for part in self.parts]
        alike = len(set(self.sizes)) == 1
        rank = _padded(max(ranks) if alike else sum(ranks))
        starts = [i * rank if alike else sum(ranks[:i]) for i in range(len(ranks))]
        columns = len(ranks) * rank if alike else rank
        example = next(a for part in self.parts for a, _, _ in part)
        down = torch.zeros((columns, example.shape[1]), dtype=torch.float32, device=example.device)
        up = torch.zeros((sum(self.sizes), rank), dtype=torch.float32, device=example.device)
        row = 0
        for part, size, start in zip(self.parts, self.sizes, starts, strict=True):
            column = start
            for a, b, scaling in part:
                into = column - start if alike else column
                down[column : column + a.shape[0]] = a.detach()
                up[row : row + size, into : into + a.shape[0]] = b.detach().float() * scaling
                column += a.shape[0]
            row += size
        if self.input_scale is not None:
            down /= self.input_scale.float()
        return down.to(dtype), up.to(dtype)


class Shared:
    """First factors of several products that read the same quantized rows: one pass over the rows for all of them.

    Args:
        members: none of them twice.
    """

    def __init__(self, members: Sequence[LowRank]) -> None:
        self.members = list(members)
        self._made: dict[torch.dtype, Tensor] = {}

    def down(self, dtype: torch.dtype) -> Tensor:
        """[columns of all members, K]."""
        if dtype not in self._made:
            self._made[dtype] = torch.cat([member.made(dtype)[0] for member in self.members])
        return self._made[dtype]

    def columns(self, member: LowRank, dtype: torch.dtype) -> slice:
        """Where a member's columns lie in the product with `down`."""
        sizes = [m.made(dtype)[0].shape[0] for m in self.members]
        index = next(i for i, m in enumerate(self.members) if m is member)
        return slice(sum(sizes[:index]), sum(sizes[: index + 1]))


def _padded(rank: int) -> int:
    return -(-rank // _UNIT) * _UNIT
