"""Write the trained parts as a stock FluxPipeline folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritflow.scenes import training_captions
from tritflow.training.flow import SmallFlux, shift_of
from tritflow.training.models import SEQUENCE_LENGTH

# Prompts that come with the folder for whoever quantizes it: training captions, so nothing held out is among them.
CALIBRATION_PROMPTS = 6144
CALIBRATION_SEED = 77


def export_pipeline(
    folder: Path, model: SmallFlux, vae: Any, tokenizers: tuple[Any, Any], size: int, guidance: float
) -> None:
    """Save everything in bfloat16 safetensors of at most 14 MB a file, with the folder's generation defaults; the
    scheduler shifts noise levels as they were trained at this size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts: list[nn.Module] = [model.clip, model.t5, model.transformer, vae]
    for part in parts:
        part.to("cpu", torch.bfloat16).eval()
    vae.to(memory_format=torch.contiguous_format)
    vae.register_to_config(sample_size=size)
    pipe: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift_of(size // 16), use_dynamic_shifting=False),
        vae=vae,
        text_encoder=model.clip,
        tokenizer=tokenizers[0],
        text_encoder_2=model.t5,
        tokenizer_2=tokenizers[1],
        transformer=model.transformer,
    )
    pipe.save_pretrained(folder, safe_serialization=True, max_shard_size="14MB")
    for path in folder.glob("*/config.json"):  # where a kept part was loaded from is nobody else's business
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2) + "\n")
    defaults = {
        "height": size,
        "width": size,
        "num_inference_steps": 28,
        "guidance_scale": guidance,
        "max_sequence_length": SEQUENCE_LENGTH,
    }
    (folder / "generation.json").write_text(json.dumps(defaults, indent=2) + "\n")
    captions = dict.fromkeys(training_captions(2 * CALIBRATION_PROMPTS, seed=CALIBRATION_SEED))
    (folder / "calibration_prompts.txt").write_text("\n".join(list(captions)[:CALIBRATION_PROMPTS]) + "\n")
