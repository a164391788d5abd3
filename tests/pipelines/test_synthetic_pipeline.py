"""A whole pipeline with random content: FLUX.1-dev's configs by name, a tiny one drawn with."""

from __future__ import annotations

import pytest
import torch

from tritflow.modules import TernaryLinear
from tritflow.pipelines import synthetic_pipeline
from tritflow.pipelines.generate import generate

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


def test_a_folder_of_it_draws_the_same(parts, tmp_path):
    from tritflow.formats.checkpoint import verify_folder
    from tritflow.pipelines.loading import load_pipeline

    size = synthetic_pipeline.write_random_pipeline(tmp_path / "random", "cpu", parts)
    assert size == sum(path.stat().st_size for path in (tmp_path / "random").rglob("*") if path.is_file())
    verify_folder(tmp_path / "random" / "transformer")
    stamp = (tmp_path / "random" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    assert synthetic_pipeline.write_random_pipeline(tmp_path / "random", "cpu", parts) == size
    assert (tmp_path / "random" / "vae" / "diffusion_pytorch_model.safetensors").stat().st_mtime_ns == stamp
    settings = {"height": 64, "width": 64, "num_inference_steps": 2, "max_sequence_length": 64}
    (expected,) = generate(synthetic_pipeline.random_pipeline(parts), "a red star", 0, **settings)
    loaded = load_pipeline(tmp_path / "random", device="cpu", dtype="bfloat16")
    (found,) = generate(loaded, "a red star", 0, **settings)
    assert found.tobytes() == expected.tobytes()


def test_embeddings_are_stored_once(parts):
    encoder = synthetic_pipeline.random_pipeline(parts).text_encoder_2
    assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_the_real_size():
    sizes = {name: config for name, *_, config in synthetic_pipeline.components()}
    assert sizes["text_encoder_2"]["d_model"] == 4096
    assert sizes["transformer"]["quantization_config"]["quant_method"] == "tritflow"
    assert "quantization_config" not in dict(synthetic_pipeline.components(ternary=False)[2][-1])
    assert torch.Size(synthetic_pipeline._noise().shape).numel() == 1 << 20
