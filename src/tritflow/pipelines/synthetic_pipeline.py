"""FLUX.1-dev's whole pipeline by its published configs, with random content: for measuring, not drawing.

Contents are repeated noise, made in host memory in seconds: text encoders, transformer and VAE are as large and as slow
as the real ones, and the pictures are noise. The tokenizers are the small FLUX's.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.assets import teacher_path
from tritflow.config import TernaryConfig
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.pipelines.component_sizes import meta_model

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
RANDOM = "FLUX.1-dev's configs, random weights"
"""The model of such a pipeline, in results."""
_PERIOD = 1 << 20
_DEVIATION = 0.02

Component = tuple[str, Any, str, str, dict[str, Any]]
"""Name, kind (`text`, `transformer`, `vae`), library, class, config."""


def components(ternary: bool = True) -> tuple[Component, ...]:
    """FLUX.1-dev's models, with a ternary or a dense transformer."""
    config = dict(FLUX1_DEV)
    if ternary:
        config["quantization_config"] = {"quant_method": "tritflow", "digest": "0" * 64, **TernaryConfig().to_dict()}
    return (
        ("text_encoder", "text", "transformers", "CLIPTextModel", CLIP_L),
        ("text_encoder_2", "text", "transformers", "T5EncoderModel", T5_XXL),
        ("transformer", "transformer", "diffusers", "FluxTransformer2DModel", config),
        ("vae", "vae", "diffusers", "AutoencoderKL", VAE),
    )


def random_pipeline(parts: tuple[Component, ...] | None = None) -> Any:
    """A stock `FluxPipeline` in bf16 with a ternary transformer, in host memory (13 GB).

    Args:
        parts: of the pipeline; FLUX.1-dev's by default. Input features of ternary layers have to be multiples of 128.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import AutoTokenizer

    models: dict[str, Any] = {
        name: meta_model(library, cls, config, torch.bfloat16)
        for name, _, library, cls, config in (components() if parts is None else parts)
    }
    noise, trits = _noise(), _random_bytes()
    for model in models.values():
        _fill(model, noise, trits)
    # The shift of FLUX.1-dev's scheduler at 1024x1024.
    pipe: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        tokenizer=AutoTokenizer.from_pretrained(teacher_path() / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(teacher_path() / "tokenizer_2"),
        **models,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _noise() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(_PERIOD, generator=g) * _DEVIATION).bfloat16()


def _random_bytes() -> Tensor:
    """Bytes of four valid codes each."""
    g = torch.Generator().manual_seed(0)
    codes = torch.tensor([a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product((0, 1, 3), repeat=4)])
    return codes[torch.randint(81, (_PERIOD,), generator=g)].to(torch.uint8)


def _fill(model: Any, noise: Tensor, trits: Tensor) -> None:
    positions = [name for name, _ in model.named_buffers() if name.endswith("position_ids")]
    model.to_empty(device="cpu").eval().requires_grad_(False)
    norms = {f"{name}.weight" for name, m in model.named_modules() if not isinstance(m, nn.Linear | nn.Conv2d)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().view(-1)
        if name in positions:
            flat.copy_(torch.arange(flat.numel()))
        elif tensor.dim() == 1 and name in norms:
            flat.fill_(1.0)
        else:
            source = trits if flat.dtype == torch.uint8 else noise.to(flat.dtype)
            flat.copy_(source.repeat(-(-flat.numel() // _PERIOD))[: flat.numel()])
