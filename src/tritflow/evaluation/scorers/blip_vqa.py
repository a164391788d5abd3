"""BLIP visual question answering: how sure the model is that a noun phrase is in the picture."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from tritflow.evaluation.scorers.loading import CLIP_MEAN, CLIP_STD, normalise, resize, to_tensor
from tritflow.evaluation.scorers.weights import identity, load_model, load_tokenizer

DEFAULT = "Salesforce/blip-vqa-capfilt-large"
STANDS_FOR = "BLIP model_base_vqa_capfilt_large"
SIDE = 480
MAX_TOKENS = 35
_ENCODE = 30523  # the token that begins a question in BLIP's vocabulary
_BEGIN = 30522  # and the one that begins an answer


def question(phrase: str) -> str:
    """The phrase as BLIP was asked questions in training: lower case, without punctuation, with a question mark."""
    return re.sub(r"[.!\"()*#:;~]", "", f"{phrase}?".lower()).rstrip()


class BlipVqa:
    """P(yes) / (P(yes) + P(no)) of the first word of the answer.

    `source`: folder or hub id of a `BlipForQuestionAnswering` with its BERT tokenizer.
    """

    def __init__(self, source: str = DEFAULT, device: str = "cpu") -> None:
        from transformers import BlipForQuestionAnswering

        self.model = load_model(BlipForQuestionAnswering, source, "vqa", device)
        self.tokenizer = load_tokenizer(source, "vqa")
        self.yes, self.no = (self.tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
        vocabulary = self.model.config.text_config.vocab_size
        # Smaller vocabularies, as in tests, have neither special token: the tokenizer's own stay.
        self.encode = _ENCODE if vocabulary > _ENCODE else None
        self.begin = _BEGIN if vocabulary > _BEGIN else self.tokenizer.cls_token_id
        self.side = self.model.config.vision_config.image_size if self.encode is None else SIDE
        self.device = device
        self.name = f"transformers BLIP-VQA {identity(source)}"

    @torch.inference_mode()
    def ask(self, pictures: Sequence[NDArray[np.uint8]], phrases: Sequence[Sequence[str]]) -> list[list[float]]:
        """For each picture, how sure the model is of each of its phrases, 0..1. A picture is encoded once."""
        of = [i for i, mine in enumerate(phrases) for _ in mine]
        if not of:
            return [[] for _ in phrases]
        pixels = resize(to_tensor(pictures, self.device), self.side, self.side, "bicubic")
        seen = self.model.vision_model(
            pixel_values=normalise(pixels, CLIP_MEAN, CLIP_STD), interpolate_pos_encoding=True
        ).last_hidden_state[of]
        tokens = self.tokenizer(
            [question(p) for mine in phrases for p in mine],
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        ids = tokens.input_ids.clone()
        if self.encode is not None:
            ids[:, 0] = self.encode
        asked = self.model.text_encoder(
            input_ids=ids,
            attention_mask=tokens.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=self.device),
        ).last_hidden_state
        start = torch.full((len(of), 1), self.begin, dtype=torch.long, device=self.device)
        logits = self.model.text_decoder(
            input_ids=start, encoder_hidden_states=asked, encoder_attention_mask=tokens.attention_mask
        ).logits[:, 0]
        # The softmax over yes and no alone is the ratio of their probabilities.
        sure = logits[:, [self.yes, self.no]].float().softmax(-1)[:, 0].tolist()
        answers: list[list[float]] = [[] for _ in phrases]
        for i, p in zip(of, sure, strict=True):
            answers[i].append(p)
        return answers
