"""What every model family states, and what follows from it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from tritflow.formats.architecture import Shape, check_shapes
from tritflow.formats.errors import CheckpointError


class FamilyError(ValueError):
    """A model is of no known family, or its config or tensors do not fit the family."""


class Family(ABC):
    """One family of transformers: names and shapes only, no model is built.

    Attributes:
        name: as written in configs and results.
        transformer_class: the diffusers class.
        targets: `fnmatch` patterns of the modules that are ternary by default.
    """

    name: ClassVar[str]
    transformer_class: ClassVar[str]
    targets: ClassVar[tuple[str, ...]]

    @abstractmethod
    def shapes(self, config: Mapping[str, Any]) -> dict[str, Shape]:
        """Every tensor of the model that `config` describes (diffusers names), in the model's order.

        Raises:
            CheckpointError: a value that no model of this family has.
        """

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise `FamilyError` unless `config` (a diffusers config.json) is one of this family's."""
        if config.get("_class_name") != self.transformer_class:
            raise FamilyError(f"'{config.get('_class_name')}' is not {self.transformer_class}")
        try:
            self.shapes(config)
        except CheckpointError as error:
            raise FamilyError(str(error)) from None

    def check_tensors(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check a dense checkpoint's tensors (name -> shape, diffusers names) before any work starts.

        Raises:
            FamilyError: names the first tensor that is missing, unknown or of another shape than `config` asks.
        """
        try:
            check_shapes(config, shapes, self.transformer_class)
        except CheckpointError as error:
            raise FamilyError(str(error)) from None

    def block_order(self, config: Mapping[str, Any]) -> list[str]:
        """Module names of the blocks in the order in which they run."""
        return list(dict.fromkeys(".".join(name.split(".")[:2]) for name in self.block_linears(config)))

    def block_linears(self, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
        """Every linear inside the blocks: name -> (out_features, in_features), in block order."""
        roots = tuple(target.removesuffix("*") for target in self.targets)
        return {
            name.removesuffix(".weight"): (shape[0], shape[1])
            for name, shape in self.shapes(config).items()
            if name.startswith(roots) and name.endswith(".weight") and len(shape) == 2
        }
