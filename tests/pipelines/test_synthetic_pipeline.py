"""A whole pipeline with random content: FLUX.1-dev's configs by name, a tiny one drawn with."""

from __future__ import annotations

import pytest
import torch

from tritflow.modules import TernaryLinear
from tritflow.pipelines import synthetic_pipeline
from tritflow.pipelines.generate import generate
from tritflow.profiling import end_to_end

TINY = {
    "text_encoder": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 32,
    },
    "text_encoder_2": {"d_model": 48, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2},
    "transformer": {
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "axes_dims_rope": [16, 24, 24],
        "joint_attention_dim": 48,
        "pooled_projection_dim": 32,
    },
    "vae": {"block_out_channels": [32] * 4, "layers_per_block": 1, "norm_num_groups": 8},
}


@pytest.fixture
def parts():
    return tuple(
        (name, kind, library, cls, config | TINY[name])
        for name, kind, library, cls, config in synthetic_pipeline.components()
    )


def test_it_draws_and_is_the_same_again(parts):
    pipe = synthetic_pipeline.random_pipeline(parts)
    assert type(pipe).__name__ == "FluxPipeline"
    ternary = [m for m in pipe.transformer.modules() if isinstance(m, TernaryLinear)]
    assert len(ternary) == 14 + 6
    assert all(set(m.trits().unique().tolist()) <= {-1, 0, 1} for m in ternary)
    assert pipe.text_encoder_2.encoder.final_layer_norm.weight.eq(1).all()
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
    (picture,) = generate(pipe, "a red star", 0, **settings)
    (again,) = generate(synthetic_pipeline.random_pipeline(parts), "a red star", 0, **settings)
    assert picture.size == (64, 64)
    assert picture.tobytes() == again.tobytes()
    assert len(set(picture.tobytes())) > 16  # something was drawn


def test_the_bench_takes_it(parts, monkeypatch):
    monkeypatch.setattr(synthetic_pipeline, "components", lambda: parts)
    monkeypatch.setattr(
        end_to_end,
        "generate",
        lambda pipe, prompt, seed, num_inference_steps: generate(
            pipe, prompt, seed, height=64, width=64, num_inference_steps=num_inference_steps, max_sequence_length=64
        ),
    )
    run = end_to_end.measure(
        None, device="cpu", mode="w2a8", optimized=True, num_inference_steps=2, rounds=1, dtype="bfloat16"
    )
    assert run["model"] == synthetic_pipeline.RANDOM
    assert run["optimized"]
    assert run["later"]["text"]["p50"] > 0


def test_the_real_size():
    sizes = {name: config for name, *_, config in synthetic_pipeline.components()}
    assert sizes["text_encoder_2"]["d_model"] == 4096
    assert sizes["transformer"]["quantization_config"]["quant_method"] == "tritflow"
    assert "quantization_config" not in dict(synthetic_pipeline.components(ternary=False)[2][-1])
    assert torch.Size(synthetic_pipeline._noise().shape).numel() == 1 << 20
