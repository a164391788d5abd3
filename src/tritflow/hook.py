"""Teaches diffusers the checkpoint format as soon as both packages are imported, in either order.

diffusers has no entry point for quantizers: a third party inserts itself into two dicts of
`diffusers.quantizers.auto`. Importing diffusers from `import tritflow` would cost seconds, so a finder waits
for that module instead and runs the registration right after its body. This file imports nothing heavy.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_REGISTRY_MODULE = "diffusers.quantizers.auto"


def _register() -> None:
    # Importing the plug-in registers it. By name: the package's root must not depend on a room, or every room would
    # depend on that one. When the plug-in itself is what imports diffusers, it is half-way through and goes on after.
    importlib.import_module("tritflow.pipelines.plugin")


class _RegisteringLoader(importlib.abc.Loader):
    """Runs the real loader, gives the module back its own loader, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        _register()


class _RegistryFinder(importlib.abc.MetaPathFinder):
    """Wraps the loader of the one module it waits for; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _REGISTRY_MODULE:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            if isinstance(finder, _RegistryFinder) or find is None:
                continue
            spec = find(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


def install() -> None:
    """Register at once if diffusers' registry is already imported, else when it is. Safe to call twice."""
    registry = sys.modules.get(_REGISTRY_MODULE)
    # The dict is checked too: another thread may be half-way through importing the registry.
    if registry is not None and hasattr(registry, "AUTO_QUANTIZATION_CONFIG_MAPPING"):
        _register()
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())
