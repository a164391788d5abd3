"""Model families: one file each. A family says which linears are ternary and in which order blocks run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tritflow.models.family import Family, FamilyError
from tritflow.models.flux1 import FLUX1
from tritflow.models.flux2 import FLUX2

FAMILIES: dict[str, Family] = {family.name: family for family in (FLUX1, FLUX2)}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family whose transformer class a diffusers `config.json` names, the config checked against it.

    Raises:
        FamilyError: no family has this class, or the config does not fit the family.
    """
    name = config.get("_class_name")
    for family in FAMILIES.values():
        if family.transformer_class == name:
            family.check_config(config)
            return family
    known = ", ".join(f"{f.name} ({f.transformer_class})" for f in FAMILIES.values())
    raise FamilyError(f"'{name}' is not a transformer that tritflow knows; supported: {known}")


__all__ = ["FAMILIES", "FLUX1", "FLUX2", "Family", "FamilyError", "family_of"]
