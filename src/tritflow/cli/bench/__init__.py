"""`tritflow bench`: kernels, whole generations, bytes on disk and more."""

from tritflow.cli.bench import (
    attention,
    campaign,
    detector,
    distillation,
    generation,
    kernels,
    lora,
    memory,
    model,
    quantization,
    scaling,
    suites,
)
from tritflow.cli.bench.app import app

__all__ = [
    "app",
    "attention",
    "campaign",
    "detector",
    "distillation",
    "generation",
    "kernels",
    "lora",
    "memory",
    "model",
    "quantization",
    "scaling",
    "suites",
]
