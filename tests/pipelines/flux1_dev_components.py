"""Sizes of FLUX.1-dev's components, no weights."""

from __future__ import annotations

import torch

from tritflow.pipelines.component_sizes import Size, measure, meta_model
from tritflow.pipelines.synthetic_pipeline import components


def flux1_dev(ternary: bool = True) -> list[Size]:
    """Sizes in bf16."""
    return [
        measure(name, kind, meta_model(library, cls, values, torch.bfloat16))
        for name, kind, library, cls, values in components(ternary)
    ]
