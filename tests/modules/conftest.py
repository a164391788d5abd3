from __future__ import annotations

import pytest
import torch

from tritflow.modules import TernaryLinear
from tritflow.testing import random_linear


@pytest.fixture
def make_ternary():
    """A TernaryLinear with random trits and scales."""

    def make(in_features=200, out_features=64, *, columns=False, bias=True, seed=0, **kwargs):
        g = torch.Generator().manual_seed(seed)
        linear = random_linear(in_features, out_features, bias=bias, seed=seed)
        trits = torch.randint(-1, 2, (out_features, in_features), generator=g, dtype=torch.int8)
        scale = torch.rand(out_features, generator=g) * 0.1 + 0.02
        input_scale = torch.rand(in_features, generator=g) + 0.5 if columns else None
        return TernaryLinear.from_linear(linear, trits, scale, input_scale, **kwargs)

    return make
