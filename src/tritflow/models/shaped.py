"""What follows for a family from its tensors' names and shapes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from tritflow.formats.architecture import Shape, check_shapes
from tritflow.formats.errors import CheckpointError
from tritflow.models.family import Family, FamilyError


class ShapedFamily(Family):
    """A family whose linears follow from its `shapes`, which `formats.architecture` has to know (`register_shapes`)."""

    @abstractmethod
    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Every tensor of the model that `config` describes (diffusers names), in the model's order.

        Raises:
            CheckpointError: a value that no model of this family has.
        """

    def check_config(self, config: Mapping[str, Any]) -> None:
        """See `Family.check_config`."""
        if config.get("_class_name") != self.transformer_class:
            raise FamilyError(f"'{config.get('_class_name')}' is not {self.transformer_class}")
        try:
            self.shapes(config)
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
            for name, shape in self.shapes(config).items()
            if name.startswith(roots) and name.endswith(".weight") and len(shape) == 2
        }
