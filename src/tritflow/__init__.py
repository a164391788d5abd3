"""tritflow: FLUX-class text-to-image models at 1.58 bits."""

from __future__ import annotations

__version__ = "0.1.0"
