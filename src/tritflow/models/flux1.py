"""FLUX.1 (dev, schnell and their finetunes): double blocks of two streams, then single blocks of one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from tritflow.formats.architecture import FLUX1 as CLASS_NAME
from tritflow.formats.architecture import check_shapes, flux1_shapes
from tritflow.formats.errors import CheckpointError
from tritflow.models.family import Family, FamilyError


class Flux1(Family):
    """`FluxTransformer2DModel`. 14 linears a double block, 6 a single block: 494 in FLUX.1-dev."""

    name: ClassVar[str] = "flux1"
    transformer_class: ClassVar[str] = CLASS_NAME
    targets: ClassVar[tuple[str, ...]] = ("transformer_blocks.*", "single_transformer_blocks.*")

    def check_config(self, config: Mapping[str, Any]) -> None:
        """See `Family.check_config`."""
        if config.get("_class_name") != self.transformer_class:
            raise FamilyError(f"'{config.get('_class_name')}' is not {self.transformer_class}")
        try:
            flux1_shapes(config)
        except CheckpointError as error:
            raise FamilyError(str(error)) from None

    def check_tensors(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """See `Family.check_tensors`."""
        try:
            check_shapes(config, shapes, self.transformer_class)
        except CheckpointError as error:
            raise FamilyError(str(error)) from None

    def block_order(self, config: Mapping[str, Any]) -> list[str]:
        """See `Family.block_order`."""
        return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in self.block_linears(config)))

    def block_linears(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """See `Family.block_linears`."""
        roots = tuple(target.removesuffix("*") for target in self.targets)
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in flux1_shapes(config).items()
            if name.startswith(roots) and name.endswith(".weight") and len(shape) == 2
        }


FLUX1 = Flux1()
