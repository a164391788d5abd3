"""The parts of a pipeline folder as the start of a leg: VAE, text encoders, transformer, in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tritflow.assets import ASSETS, asset_path
from tritflow.training.flow import SmallFlux


class StartError(ValueError):
    """A folder that no leg can start from. The message says why, and what to name instead."""


def folder_of(name: str) -> Path:
    """The pipeline folder that `name` means: a built-in model's name or a folder. Raises `StartError` for another."""
    folder = asset_path(name) if name in ASSETS else Path(name)
    if not (folder / "model_index.json").is_file():
        raise StartError(f"'{name}' is no pipeline folder (no model_index.json); name one, or 'small' for the built-in")
    return folder


def vae_of(folder: Path) -> Any:
    """The VAE of a pipeline folder, float32, on the CPU."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()


def check_words(folder: Path, tokenizers: tuple[Any, Any]) -> None:
    """Raise `StartError` if a pipeline folder's tokenizers number words in another way than `tokenizers`."""
    from transformers import AutoTokenizer

    for name, ours in zip(("tokenizer", "tokenizer_2"), tokenizers, strict=True):
        if AutoTokenizer.from_pretrained(folder / name).get_vocab() != ours.get_vocab():
            raise StartError(f"{folder / name}: another vocabulary than that of today's captions; train from nothing")


def model_of(folder: Path, tokenizers: tuple[Any, Any]) -> SmallFlux:
    """Text encoders and transformer of a pipeline folder, float32, on the CPU.

    Raises:
        StartError: its tokenizers number words in another way than `tokenizers`, so its encoders would misread all.
    """
    from diffusers import FluxTransformer2DModel
    from transformers import CLIPTextModel, T5EncoderModel

    check_words(folder, tokenizers)
    transformer: Any = FluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    return SmallFlux(
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        transformer,
    )
