"""FLUX.1-dev's components by their published configs: facts, no weights."""

from __future__ import annotations

from typing import Any

import torch

from tritflow.config import TernaryConfig
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.pipelines.component_sizes import Size, measure, meta_model

CLIP_L: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}
T5_XXL: dict[str, Any] = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "vocab_size": 32128,
    "relative_attention_num_buckets": 32,
    "feed_forward_proj": "gated-gelu",
    "tie_word_embeddings": False,
}
VAE: dict[str, Any] = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "latent_channels": 16,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "sample_size": 1024,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "scaling_factor": 0.3611,
    "shift_factor": 0.1159,
}


def components(ternary: bool) -> tuple[tuple[str, Any, str, str, dict[str, Any]], ...]:
    """(name, kind, library, class, config) of each, with a ternary or a dense transformer."""
    config = dict(FLUX1_DEV)
    if ternary:
        config["quantization_config"] = {"quant_method": "tritflow", "digest": "0" * 64, **TernaryConfig().to_dict()}
    return (
        ("text_encoder", "text", "transformers", "CLIPTextModel", CLIP_L),
        ("text_encoder_2", "text", "transformers", "T5EncoderModel", T5_XXL),
        ("transformer", "transformer", "diffusers", "FluxTransformer2DModel", config),
        ("vae", "vae", "diffusers", "AutoencoderKL", VAE),
    )


def flux1_dev(ternary: bool = True) -> list[Size]:
    """Sizes in bf16."""
    return [
        measure(name, kind, meta_model(library, cls, values, torch.bfloat16))
        for name, kind, library, cls, values in components(ternary)
    ]
