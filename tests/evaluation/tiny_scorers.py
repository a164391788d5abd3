"""The real scorer classes with tiny random weights, saved as folders that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "a photo of object yes no the grade is red blue green cat dog cup bench bowl score 1 2 3 4 5 ?".split()  # noqa: SIM905


def bert_tokenizer() -> Any:
    from transformers import BertTokenizer

    letters = [chr(c) for c in range(33, 127)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *letters, *("##" + c for c in letters)]
    return BertTokenizer(vocab={p: i for i, p in enumerate(dict.fromkeys(pieces))})


def clip_tokenizer() -> Any:
    from tritflow.testing import _clip_tokenizer

    return _clip_tokenizer()


def llama_tokenizer() -> Any:
    """Words and characters, as a plain fast tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(32, 127)]
    vocab = {p: i for i, p in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", "<image>", *WORDS, *letters]))}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def _saved(folder: Path, make: Any, tokenizer: Any = None, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


_LAYERS = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}


def mask2former(folder: Path, labels: int = 80) -> Path:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        image_size=64,
        embed_dim=8,
        depths=[1, 1, 1, 1],
        num_heads=[1, 1, 1, 1],
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=labels,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        encoder_feedforward_dim=16,
        num_queries=12,
    )
    return _saved(folder, lambda: Mask2FormerForUniversalSegmentation(config))


def clip(folder: Path) -> Path:
    from transformers import CLIPConfig, CLIPModel

    tokenizer = clip_tokenizer()
    text = {
        **_LAYERS,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = CLIPConfig(
        text_config=text, vision_config={**_LAYERS, "image_size": 32, "patch_size": 16}, projection_dim=8
    )
    return _saved(folder, lambda: CLIPModel(config), tokenizer)


def blip(folder: Path) -> Path:
    from transformers import BlipConfig, BlipForQuestionAnswering

    tokenizer = bert_tokenizer()
    text = {**_LAYERS, "vocab_size": len(tokenizer), "encoder_hidden_size": 16, "max_position_embeddings": 64}
    for name in ("bos", "eos", "sep", "pad"):
        text[f"{name}_token_id"] = {"bos": 2, "eos": 3, "sep": 3, "pad": 0}[name]
    config = BlipConfig(text_config=text, vision_config={**_LAYERS, "image_size": 32, "patch_size": 16})
    return _saved(folder, lambda: BlipForQuestionAnswering(config), tokenizer)


def dpt(folder: Path) -> Path:
    from transformers import DPTConfig, DPTForDepthEstimation

    config = DPTConfig(
        **{**_LAYERS, "num_hidden_layers": 4},
        image_size=64,
        patch_size=16,
        backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
    )
    return _saved(folder, lambda: DPTForDepthEstimation(config))


def owlv2(folder: Path) -> Path:
    from transformers import Owlv2Config, Owlv2ForObjectDetection

    tokenizer = clip_tokenizer()
    text = {
        **_LAYERS,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 16,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = Owlv2Config(
        text_config=text, vision_config={**_LAYERS, "image_size": 64, "patch_size": 16}, projection_dim=16
    )
    return _saved(folder, lambda: Owlv2ForObjectDetection(config), tokenizer)


def llava(folder: Path) -> Path:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    tokenizer = llama_tokenizer()
    text = {**_LAYERS, "model_type": "llama", "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    vision = {**_LAYERS, "model_type": "clip_vision_model", "num_hidden_layers": 3, "image_size": 32, "patch_size": 16}
    config = LlavaConfig(
        text_config={**text, "bos_token_id": 1, "eos_token_id": 2},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return _saved(folder, lambda: LlavaForConditionalGeneration(config), tokenizer)
