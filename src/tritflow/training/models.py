"""The small FLUX's parts: stock diffusers and transformers classes at a small size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

LATENT_CHANNELS = 16
# Characters for words that nobody says (`words`), in the places of capital letters and digits. They have no case and no
# decomposition, so that no normalizer touches them.
RUNES = "".join(chr(c) for c in range(0x16A0, 0x16A0 + 36))
_GIVEN_UP = "ABCDEFGHIJKLMNOPQRSTUVWX0123456789YZ"
# Text tokens that the small FLUX is trained on; longer prompts are cut here.
SEQUENCE_LENGTH = 48


@dataclass(frozen=True)
class SmallFluxSize:
    """Widths and depths. The default has 13.5 M transformer parameters and FLUX.1-dev's 1 : 2 block ratio."""

    hidden: int = 256
    heads: int = 4
    double: int = 3
    single: int = 6
    text_width: int = 192
    text_layers: int = 3
    pooled_width: int = 128


def build_tokenizers(words: list[str]) -> tuple[Any, Any]:
    """CLIP's and T5's stock tokenizers over one token a word of `words`, with single characters for all else but
    capital letters and digits, whose tokens are `RUNES`."""
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer, T5Tokenizer

    letters = [chr(c) for c in range(33, 127)]
    rune = dict(zip(_GIVEN_UP, RUNES, strict=True))
    vocab = {p: i for i, p in enumerate([*letters, *(rune.get(c, c + "</w>") for c in letters)])}
    merges: list[Any] = []
    # Words grow from their last letter: its </w> occurs nowhere else, so that no other word's merge comes between.
    for word in words:
        end = word[-1] + "</w>"
        for letter in reversed(word[:-1]):
            if (letter, end) not in merges:
                merges.append((letter, end))
            end = letter + end
            vocab.setdefault(end, len(vocab))
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocab[special] = len(vocab)
    clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=SEQUENCE_LENGTH)
    # Read before the text is taken apart into bytes; they are in the vocabulary already.
    clip.add_tokens([AddedToken(c, normalized=False) for c in RUNES])
    pieces_t5 = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -6.0)]
    pieces_t5 += [(f"▁{word}", -3.0) for word in words] + [(rune.get(c, c), -8.0) for c in letters]
    t5 = T5Tokenizer(vocab=pieces_t5, extra_ids=0, model_max_length=512)
    return clip, t5


def build_text_encoders(size: SmallFluxSize, clip_tokenizer: Any, t5_tokenizer: Any) -> tuple[Any, Any]:
    """A small CLIPTextModel (pooled state) and T5EncoderModel (a state a token)."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=size.pooled_width,
            intermediate_size=size.pooled_width * 4,
            projection_dim=size.pooled_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=clip_tokenizer.model_max_length,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=size.text_width,
            d_kv=48,
            d_ff=512,
            num_layers=size.text_layers,
            num_heads=4,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=64,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )
    return clip, t5


def build_transformer(size: SmallFluxSize) -> Any:
    """A stock FluxTransformer2DModel with a guidance embedding; modulations start at zero (adaLN-Zero, DiT)."""
    from diffusers import FluxTransformer2DModel

    head = size.hidden // size.heads
    first = head // 8
    model: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=LATENT_CHANNELS * 4,
        num_layers=size.double,
        num_single_layers=size.single,
        attention_head_dim=head,
        num_attention_heads=size.heads,
        joint_attention_dim=size.text_width,
        pooled_projection_dim=size.pooled_width,
        guidance_embeds=True,
        axes_dims_rope=(first, (head - first) // 2, (head - first) // 2),
    )
    zero = [model.proj_out, model.norm_out.linear]
    for block in model.transformer_blocks:
        zero += [block.norm1.linear, block.norm1_context.linear]
    for block in model.single_transformer_blocks:
        zero.append(block.norm.linear)
    for linear in zero:
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return model


def build_vae() -> Any:
    """A stock AutoencoderKL: 8x smaller, 16 latent channels as FLUX.1's."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 64, 96, 128),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=128,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def parameter_count(module: torch.nn.Module) -> int:
    """All parameters of a module."""
    return sum(p.numel() for p in module.parameters())
