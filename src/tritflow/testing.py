"""What tests share: a relative comparison, random linears, and a tiny FLUX pipeline with random weights.

Nothing here is used by the product itself. diffusers and transformers are imported inside the factories.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

_WORDS = (
    "a an the one two three four five six of on in and with to left right above below front behind next "
    "red green blue yellow purple orange white black plain striped dotted small large big tiny picture photo "
    "circle square triangle star cross ring heart diamond cube sphere circles squares triangles stars crosses"
)


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """`||actual - expected|| / ||expected||` in float64 (Frobenius); shapes must agree, NaN gives NaN."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shapes differ: {tuple(actual.shape)} and {tuple(expected.shape)}")
    a, e = actual.detach().double().cpu(), expected.detach().double().cpu()
    return float((a - e).norm() / e.norm().clamp_min(torch.finfo(torch.float64).tiny))


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Fail unless `relative_error(actual, expected) <= tolerance`; a NaN fails too."""
    error = relative_error(actual, expected)
    if not error <= tolerance:
        worst = (actual.detach().double().cpu() - expected.detach().double().cpu()).abs().max()
        raise AssertionError(
            f"relative error {error:.3e} exceeds {tolerance:.1e} (largest difference {float(worst):.3e})"
        )


def random_linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Linear:
    """A Linear with Gaussian weights of standard deviation `in_features ** -0.5` and rows of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(in_features, out_features, bias=bias)
    row_size = torch.empty(out_features, 1).uniform_(0.5, 2.0, generator=generator)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(out_features, in_features, generator=generator) * row_size * in_features**-0.5)
        if bias:
            linear.bias.copy_(torch.randn(out_features, generator=generator) * 0.1)
    return linear.to(dtype)


def rope_axes(head_dim: int) -> tuple[int, int, int]:
    """Even split of `head_dim` into FLUX's three rotary axes, in the spirit of (16, 56, 56) for 128."""
    first = next(a for a in range(2, head_dim, 2) if a >= head_dim / 8 and (head_dim - a) % 4 == 0)
    return first, (head_dim - first) // 2, (head_dim - first) // 2


def tiny_flux_transformer(
    *,
    hidden: int = 32,
    heads: int = 2,
    double: int = 1,
    single: int = 1,
    seed: int = 0,
    guidance: bool = True,
    text_dim: int = 32,
    pooled_dim: int = 32,
    in_channels: int = 16,
    out_channels: int | None = None,
) -> Any:
    """A stock `FluxTransformer2DModel` with random weights (float32, eval mode).

    Args:
        hidden: width of the residual stream; `hidden / heads` must be a multiple of 4 from 8 on.
        heads: attention heads.
        double: number of double blocks (`transformer_blocks`).
        single: number of single blocks.
        seed: of the weights; the global generator is left as it was.
        guidance: whether the guidance scale is embedded, as in FLUX.1-dev.
        text_dim: width of the per-token text states.
        pooled_dim: width of the pooled text state.
        in_channels: packed latent channels (four times the VAE's; more for Fill and Control).
        out_channels: packed latent channels that are predicted; None: `in_channels`.
    """
    from diffusers import FluxTransformer2DModel

    if hidden % heads or (hidden // heads) % 4 or hidden // heads < 8:
        raise ValueError(f"hidden / heads must be a multiple of 4 and at least 8, not {hidden}/{heads}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = FluxTransformer2DModel(
            patch_size=1,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=hidden // heads,
            num_attention_heads=heads,
            joint_attention_dim=text_dim,
            pooled_projection_dim=pooled_dim,
            guidance_embeds=guidance,
            axes_dims_rope=rope_axes(hidden // heads),
        )
    return model.eval()


def tiny_flux2_transformer(
    *,
    hidden: int = 32,
    heads: int = 2,
    double: int = 1,
    single: int = 2,
    seed: int = 0,
    text_dim: int = 48,
    guidance: bool = False,
) -> Any:
    """A stock `Flux2Transformer2DModel` with random weights (float32, eval mode).

    Args:
        hidden: width of the residual stream; `hidden / heads` must be a multiple of 8.
        heads: attention heads.
        double: number of double blocks.
        single: number of single blocks.
        seed: of the weights; the global generator is left as it was.
        text_dim: width of the text states (three layers of the text encoder side by side).
        guidance: whether the guidance scale is embedded, as in dev; klein does without.
    """
    from diffusers import Flux2Transformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Flux2Transformer2DModel(
            in_channels=16,
            num_layers=double,
            num_single_layers=single,
            attention_head_dim=hidden // heads,
            num_attention_heads=heads,
            joint_attention_dim=text_dim,
            axes_dims_rope=(hidden // heads // 4,) * 4,
            guidance_embeds=guidance,
        )
        # Gates have no bias: from weights of the default size they are nearly zero, and blocks would do nothing.
        for name, parameter in model.named_parameters():
            if "modulation" in name:
                parameter.data.mul_(20)
    return model.eval()


def dense_twin(model: Any) -> Any:
    """A copy of a ternary diffusers model with dense linears of exactly the same weights, in the model's dtype."""
    return copy.deepcopy(model).dequantize()


def transformer_inputs(
    transformer: Any,
    *,
    batch: int = 1,
    height: int = 4,
    width: int = 4,
    text_tokens: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:
    """Random keyword arguments of one `FluxTransformer2DModel` forward; `height * width` image tokens."""
    config = transformer.config
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    img_ids = torch.zeros(height, width, 3)
    img_ids[..., 1] = torch.arange(height)[:, None]
    img_ids[..., 2] = torch.arange(width)[None, :]
    return {
        "hidden_states": normal(batch, height * width, config.in_channels),
        "encoder_hidden_states": normal(batch, text_tokens, config.joint_attention_dim),
        "pooled_projections": normal(batch, config.pooled_projection_dim),
        "timestep": torch.linspace(0.1, 0.9, batch).to(dtype),
        "guidance": torch.full((batch,), 3.5) if config.guidance_embeds else None,
        "txt_ids": torch.zeros(text_tokens, 3, dtype=dtype),
        "img_ids": img_ids.reshape(height * width, 3).to(dtype),
        "return_dict": False,
    }


def tiny_flux_folder(
    path: str | Path,
    *,
    hidden: int = 32,
    heads: int = 2,
    double: int = 1,
    single: int = 1,
    seed: int = 0,
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a complete `FluxPipeline` folder with random weights and return its path.

    Everything is real and loadable by stock diffusers: transformer, AutoencoderKL (8x, 4 latent channels),
    CLIP and T5 encoders, two tokenizers with a small vocabulary, scheduler, and `generation.json`
    (32x32 pixels, 2 steps). All weights are safetensors; under a megabyte in all at the default sizes.

    Args:
        path: folder to write (created).
        dtype: in which the transformer, the VAE and the text encoders are stored.
        hidden, heads, double, single, seed, guidance: see `tiny_flux_transformer`.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = _clip_tokenizer(), _t5_tokenizer()
    transformer = tiny_flux_transformer(
        hidden=hidden, heads=heads, double=double, single=single, seed=seed, guidance=guidance
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        vae = AutoencoderKL(
            in_channels=3,
            out_channels=3,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.5,
            shift_factor=0.1,
            mid_block_add_attention=False,
        )
        clip = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(clip_tokenizer),
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=clip_tokenizer.model_max_length,
                bos_token_id=clip_tokenizer.bos_token_id,
                eos_token_id=clip_tokenizer.eos_token_id,
                pad_token_id=clip_tokenizer.pad_token_id,
            )
        )
        t5 = T5EncoderModel(
            T5Config(
                vocab_size=len(t5_tokenizer),
                d_model=32,
                d_kv=16,
                d_ff=64,
                num_layers=1,
                num_heads=2,
                relative_attention_num_buckets=8,
                feed_forward_proj="gated-gelu",
            )
        )
    if dtype != torch.float32:  # diffusers warns about every cast, also the idle ones
        modules: tuple[Any, ...] = (transformer, vae, clip, t5)
        for module in modules:
            torch.nn.Module.to(module, dtype)
    pipe: Any = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False),
        vae=vae,
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=transformer,
    )
    return _saved(pipe, Path(path), guidance_scale=3.5, max_sequence_length=32)


def tiny_flux2_folder(path: str | Path, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Write a complete, distilled `Flux2KleinPipeline` folder with random weights and return its path.

    As `tiny_flux_folder`: stock classes, safetensors, `generation.json` (32x32 pixels, 2 steps).

    Args:
        path: folder to write (created).
        seed: of the weights.
        dtype: in which the models are stored.
    """
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = _qwen_tokenizer()
    transformer = tiny_flux2_transformer(seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        vae: Any = AutoencoderKLFlux2(
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
            mid_block_add_attention=False,
        )
        # The pipeline reads the states after layers 9, 18 and 27.
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=27,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                max_position_embeddings=512,
            )
        )
    modules: tuple[Any, ...] = (transformer, vae, encoder)
    for module in modules:
        torch.nn.Module.to(module.eval(), dtype)
    pipe: Any = Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=True,
    )
    return _saved(pipe, Path(path), guidance_scale=1.0, max_sequence_length=64)


def _saved(pipe: Any, folder: Path, **defaults: float) -> Path:
    """Save a tiny pipeline with the generation defaults of a tiny picture."""
    pipe.save_pretrained(folder, safe_serialization=True)
    defaults = {"height": 32, "width": 32, "num_inference_steps": 2, **defaults}
    (folder / "generation.json").write_text(json.dumps(defaults, indent=2) + "\n")
    return folder


def _qwen_tokenizer() -> Any:
    """Single bytes with Qwen's special tokens and a chat template of its form."""
    from transformers import Qwen2Tokenizer

    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    letters = [*(chr(c) for c in range(33, 127)), "\u0120", "\u010a"]  # byte-level BPE's space and newline
    vocab = {piece: i for i, piece in enumerate([*letters, *specials])}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], pad_token="<|endoftext|>", model_max_length=512)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "<|im_start|>assistant\n"
    )
    return tokenizer


def _clip_tokenizer() -> Any:
    """Byte-level BPE over characters and the words above, with CLIP's special tokens and 77-token limit."""
    from transformers import CLIPTokenizer

    letters = [chr(c) for c in range(33, 127)]
    vocab: dict[str, int] = {}
    for piece in [*letters, *(c + "</w>" for c in letters)]:
        vocab.setdefault(piece, len(vocab))
    merges: list[Any] = []
    for word in dict.fromkeys(_WORDS.split()):
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces[:2] = ["".join(pair)]
            vocab.setdefault(pieces[0], len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


def _t5_tokenizer() -> Any:
    """Unigram pieces for the words above and every printable character, with T5's special tokens."""
    from transformers import T5Tokenizer

    words = dict.fromkeys(_WORDS.split())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0)]
    pieces += [(f"▁{word}", -3.0) for word in words]
    pieces += [(chr(c), -8.0) for c in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)
