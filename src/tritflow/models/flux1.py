"""FLUX.1 (dev, schnell and their finetunes): double blocks of two streams, then single blocks of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tritflow.formats.architecture import FLUX1 as CLASS_NAME
from tritflow.formats.architecture import Shape, flux1_shapes
from tritflow.models.family import Family


class Flux1(Family):
    """`FluxTransformer2DModel`. 14 linears a double block, 6 a single block: 494 in FLUX.1-dev."""

    name: ClassVar[str] = "flux1"
    transformer_class: ClassVar[str] = CLASS_NAME
    targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*", "single_transformer_blocks.*")

    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """See `Family.shapes`."""
        return flux1_shapes(config)


FLUX1 = Flux1()
