"""Layers: the ternary linear that runs, its training twin, and their swap into a model."""

from tritflow.modules.fake import FakeTernaryLinear
from tritflow.modules.packed_weight import PackedWeight
from tritflow.modules.swap import swap_linears_
from tritflow.modules.ternary_linear import TernaryLinear

__all__ = ["FakeTernaryLinear", "PackedWeight", "TernaryLinear", "swap_linears_"]
