from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tritflow.formats.packing import pack_2bit

Problem = dict[str, Tensor]


@pytest.fixture
def problem() -> Callable[..., Problem]:
    """Random tensors of one linear: x, trits, weight (packed), weight_scale, bias, input_scale."""

    def make(tokens: int, out_features: int, in_features: int, dtype: torch.dtype = torch.float32, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        trits = torch.randint(-1, 2, (out_features, in_features), generator=g, dtype=torch.int8)
        return {
            "x": torch.randn(tokens, in_features, generator=g).to(dtype),
            "trits": trits,
            "weight": pack_2bit(trits),
            "weight_scale": (torch.rand(out_features, generator=g) * 0.1 + 0.01).bfloat16(),
            "bias": torch.randn(out_features, generator=g).to(dtype),
            "input_scale": (torch.rand(in_features, generator=g) + 0.5).bfloat16(),
        }

    return make
