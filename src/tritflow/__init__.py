"""tritflow: FLUX-class text-to-image models at 1.58 bits.

Importing this package is cheap and imports neither torch nor diffusers: public names load on first use. Once
both are imported, in either order, stock diffusers reads and writes ternary checkpoints; nothing else is to be
called.
"""

from __future__ import annotations

import importlib
from typing import Any

from tritflow.hook import install as _install_hook

__version__ = "0.1.0"

# Types of these names: __init__.pyi.
_PUBLIC = {
    "CalibrationConfig": "tritflow.config",
    "ConfigError": "tritflow.config",
    "DistillationConfig": "tritflow.config",
    "Recipe": "tritflow.config",
    "TernaryConfig": "tritflow.config",
    "TernaryLinear": "tritflow.modules.ternary_linear",
    "TritflowConfig": "tritflow.pipelines.plugin",
    "compare": "tritflow.pipelines.compare",
    "configure_": "tritflow.pipelines.loading",
    "deoptimize": "tritflow.pipelines.optimize",
    "generate": "tritflow.pipelines.generate",
    "load_pipeline": "tritflow.pipelines.loading",
    "optimize": "tritflow.pipelines.optimize",
    "quantize": "tritflow.pipelines.quantize",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name == "assets":
        return importlib.import_module("tritflow.assets")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'tritflow' has no attribute '{name}'")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, "assets"])


_install_hook()
