"""A parameter of packed trits that shows the shape of the matrix it stands for."""

from __future__ import annotations

import math
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from tritflow.formats.packing import BLOCK, packed_width
from tritflow.kernels.expansion import EXPANSION, Expansion


class OffloadedShape(tuple[int, ...]):
    """(N, K) of a weight on the meta device, which also equals the shape of its bytes.

    accelerate's offloading hooks put a state dict's bytes in the place of a meta parameter, and refuse where the two
    shapes differ. (torch.Size itself cannot be subclassed.)
    """

    packed: torch.Size

    def __new__(cls, logical: torch.Size, packed: torch.Size) -> Self:
        self = super().__new__(cls, logical)
        self.packed = packed
        return self

    def __eq__(self, other: object) -> bool:
        return super().__eq__(other) or self.packed == other

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = tuple.__hash__

    def numel(self) -> int:
        """N * K."""
        return math.prod(self)


class PackedWeight(nn.Parameter):
    """uint8 bytes [N, 32 * ceil(K / 128)] whose `shape`, `size()` and `numel()` are those of the [N, K] matrix.

    LoRA loaders and parameter counts read the logical shape; bytes are counted by `nbytes` and `nelement()`, and
    every operation on the tensor (also `detach`, so also `state_dict`) sees the bytes. It never asks for a gradient.
    On the meta device, `shape` equals both.

    Args:
        data: packed bytes.
        requires_grad: must be False; there so that code which rebuilds parameters can pass it.
        in_features: K; by default all trits that the bytes hold.
        keep_expanded: whether CPU kernels may keep an expanded copy on it (`tritflow.kernels.expansion.Expansion`).

    Raises:
        ValueError: bytes that are no packed matrix of K columns, or `requires_grad`.
    """

    in_features: int

    def __new__(
        cls,
        data: Tensor,
        requires_grad: bool = False,
        in_features: int | None = None,
        keep_expanded: bool = True,
    ) -> Self:
        data = data.detach()
        features = data.shape[-1] * 4 if in_features is None else in_features
        if data.dtype != torch.uint8 or data.dim() != 2 or data.shape[1] != packed_width(features):
            raise ValueError(
                f"packed weights of {features} input features are uint8 [N, {packed_width(features)}] "
                f"({BLOCK} trits in 32 bytes), not {data.dtype} {list(data.shape)}"
            )
        if requires_grad:
            raise ValueError("packed trits take no gradient; train a FakeTernaryLinear instead")
        self: Self = torch.Tensor._make_subclass(cls, data, False)
        self.in_features = features
        if keep_expanded:
            setattr(self, EXPANSION, Expansion())
        return self

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        rows, width = torch.Tensor.size(self)
        # A compiler that traces describes the tensor by these sizes; it must see the bytes' own.
        if torch._guards.TracingContext.try_get() is not None:
            return torch.Size((rows, width))
        logical = torch.Size((rows, self.in_features))
        if self.is_meta:
            return cast(torch.Size, OffloadedShape(logical, torch.Size((rows, width))))
        return logical

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def expansion(self) -> Expansion | None:
        """What CPU kernels keep beside the bytes; None if nothing may be kept."""
        return getattr(self, EXPANSION, None)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """No effect: integers take no gradient, and `model.requires_grad_(True)` shall not fail for them."""
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        if id(self) not in memo:
            memo[id(self)] = PackedWeight(self.detach().clone(), False, self.in_features, self.expansion is not None)
        twin: PackedWeight = memo[id(self)]
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        return PackedWeight, (self.detach(), False, self.in_features, self.expansion is not None)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({self.shape[0]}x{self.in_features} trits, {self.nbytes} bytes, {self.device})"
