"""FLUX.1-dev's whole pipeline by its published configs, with random content: for measuring, not drawing.

Contents are repeated noise, made in seconds: text encoders, transformer and VAE are as large and as slow as the real
ones, and the pictures are noise. The tokenizers are the small FLUX's.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.assets import teacher_path
from tritflow.config import TernaryConfig
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.formats.checkpoint import TransformerWriter
from tritflow.pipelines.component_sizes import meta_model
from tritflow.pipelines.quantizer import ternary_linears

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
    from diffusers import FluxPipeline
    from transformers import AutoTokenizer

    noise, trits = _noise(), _random_bytes()
    pipe: Any = FluxPipeline(
        scheduler=_scheduler(),
        tokenizer=AutoTokenizer.from_pretrained(teacher_path() / "tokenizer"),
        tokenizer_2=AutoTokenizer.from_pretrained(teacher_path() / "tokenizer_2"),
        **{part[0]: _made(part, "cpu", noise, trits) for part in (components() if parts is None else parts)},
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def write_random_pipeline(out: Path, device: str = "cpu", parts: tuple[Component, ...] | None = None) -> int:
    """Write the folder of such a pipeline: a ternary transformer of two bits a trit, everything else in bf16.

    Args:
        out: the folder; components that an earlier call finished are left as they are.
        device: where contents are made, one component at a time.
        parts: as in `random_pipeline`.

    Returns:
        Bytes of the folder.
    """
    noise, trits = _noise().to(device), _random_bytes().to(device)
    small = teacher_path()
    index = json.loads((small / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if key.startswith("_") or "tokenizer" in key}
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(small / name, out / name, dirs_exist_ok=True)
    _scheduler().save_pretrained(out / "scheduler")
    index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    for part in components() if parts is None else parts:
        name, _, library, cls, config = part
        index[name] = [library, cls]
        done = out / f"{name}.done"
        if done.exists():
            continue
        model = _made(part, device, noise, trits)
        if "quantization_config" in config:
            _write_ternary(model, out / name, config)
        else:
            model.save_pretrained(out / name)
        del model
        done.touch()
    # Last, since it makes the folder a pipeline.
    (out / "model_index.json").write_text(json.dumps(index, indent=2))
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _write_ternary(model: Any, out: Path, config: Mapping[str, Any]) -> None:
    linears = ternary_linears(model)
    inside = {f"{name}.{part}" for name in linears for part in ("weight", "weight_scale", "bias")}
    writer = TransformerWriter(out, TernaryConfig(), "random")
    for name, linear in linears.items():
        bias = None if linear.bias is None else linear.bias.detach().cpu()
        writer.add_packed(name, linear.packed.cpu(), linear.in_features, linear.weight_scale.cpu(), None, bias)
    for name, tensor in model.state_dict().items():
        if name not in inside:
            writer.add_dense(name, tensor.cpu())
    writer.finish({key: value for key, value in config.items() if key != "quantization_config"})


def _scheduler() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)  # that of FLUX.1-dev at 1024x1024


def _made(part: Component, device: str, noise: Tensor, trits: Tensor) -> Any:
    """One component with its content, on `device`."""
    _, _, library, cls, config = part
    model: Any = meta_model(library, cls, config, torch.bfloat16)
    _fill(model, noise, trits, device)
    return model


def _noise() -> Tensor:
    g = torch.Generator().manual_seed(0)
    return (torch.randn(_PERIOD, generator=g) * _DEVIATION).bfloat16()


def _random_bytes() -> Tensor:
    """Bytes of four valid codes each."""
    g = torch.Generator().manual_seed(0)
    codes = torch.tensor([a | b << 2 | c << 4 | d << 6 for a, b, c, d in itertools.product((0, 1, 3), repeat=4)])
    return codes[torch.randint(81, (_PERIOD,), generator=g)].to(torch.uint8)


def _fill(model: Any, noise: Tensor, trits: Tensor, device: str) -> None:
    positions = [name for name, _ in model.named_buffers() if name.endswith("position_ids")]
    model.to_empty(device=device).eval().requires_grad_(False)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # leaving the meta device gave every name a tensor of its own
    norms = {f"{name}.weight" for name, m in model.named_modules() if not isinstance(m, nn.Linear | nn.Conv2d)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        flat = tensor.detach().view(-1)
        if name in positions:
            flat.copy_(torch.arange(flat.numel()))
        elif tensor.dim() == 1 and name in norms:
            flat.fill_(1.0)
        else:
            source = trits if flat.dtype == torch.uint8 else noise.to(flat.dtype)
            whole = flat.numel() // _PERIOD * _PERIOD
            flat[:whole].view(whole // _PERIOD, _PERIOD).copy_(source.expand(whole // _PERIOD, _PERIOD))
            flat[whole:].copy_(source[: flat.numel() - whole])
