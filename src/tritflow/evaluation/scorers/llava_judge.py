"""A vision-language model that grades how well a picture shows its prompt, 1 to 5.

T2I-CompBench++ asks ShareGPT4V-7B, first for a description and then for a grade. ShareGPT4V has LLaVA-1.5's
architecture but is not published in a form that transformers reads, so LLaVA-1.5 stands in for it. Questions are in
this project's words, decoding is greedy, and the grade is the likeliest of the five digits rather than text to parse:
a judge that answers beside the point cannot drop out of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tritflow.evaluation.api import EvaluationError
from tritflow.evaluation.scorers.loading import CLIP_MEAN, CLIP_STD, normalise, resize, to_tensor
from tritflow.evaluation.scorers.weights import identity, load_model, load_tokenizer

DEFAULT = "llava-hf/llava-1.5-7b-hf"
STANDS_FOR = "ShareGPT4V-7B with chain of thought"
DESCRIPTION_TOKENS = 96

_DESCRIBE = {
    "non_spatial": "Say in at most 50 words what happens in this picture: who or what is there, doing what, with what.",
    "complex": (
        "Say in at most 50 words what this picture shows: the objects, their colours, shapes and materials, where they "
        "are and what they do."
    ),
}
_GRADE = (
    'How well does the picture show this text: "{prompt}"? Grade it from 1 to 5. 5: everything in the text is there as '
    "described. 4: nearly everything, with small slips. 3: some of it, with important parts missing or wrong. "
    "2: hardly anything of it. 1: nothing of it."
)


class LlavaJudge:
    """`source`: folder or hub id of a `LlavaForConditionalGeneration` with its tokenizer."""

    def __init__(self, source: str = DEFAULT, device: str = "cpu") -> None:
        from transformers import LlavaForConditionalGeneration

        # 16 bits on a GPU, as the suite's script runs its judge; CPUs are no faster with them.
        dtype = torch.float16 if device.startswith("cuda") else torch.float32
        self.model = load_model(LlavaForConditionalGeneration, source, "judge", device, dtype)
        self.tokenizer = load_tokenizer(source, "judge")
        config = self.model.config
        vision = config.vision_config
        self.side = vision.image_size
        # LLaVA drops the class token, so that a picture is as many tokens as it has patches.
        self.picture_tokens = (vision.image_size // vision.patch_size) ** 2
        self.picture_token = config.image_token_id if hasattr(config, "image_token_id") else config.image_token_index
        ends = [self.tokenizer(f"The grade is {i}", add_special_tokens=False).input_ids for i in range(1, 6)]
        if len({tuple(e[:-1]) for e in ends}) != 1 or len({e[-1] for e in ends}) != 5:
            raise EvaluationError(f"the judge '{source}' has no tokens of their own for the digits 1 to 5")
        self.digits = [e[-1] for e in ends]
        self.device = device
        bits = str(dtype).removeprefix("torch.")
        self.name = (
            f"transformers LLaVA {identity(source)} in {bits}, greedy, likeliest digit, questions in tritflow's words"
        )

    @torch.inference_mode()
    def grade(self, pictures: Sequence[NDArray[np.uint8]], prompts: Sequence[str], category: str) -> list[int]:
        """1 to 5 for each picture; `category` is "non_spatial" or "complex"."""
        pixels = resize(to_tensor(pictures, self.device), self.side, self.side, "bicubic")
        pixels = normalise(pixels, CLIP_MEAN, CLIP_STD).to(self.model.dtype)
        ask = self._tokens("USER: ", f"\n{_DESCRIBE[category]} ASSISTANT:")
        asked = ask[None].expand(len(pictures), -1)
        described = self.model.generate(
            input_ids=asked,
            attention_mask=torch.ones_like(asked),
            pixel_values=pixels,
            max_new_tokens=DESCRIPTION_TOKENS,
            do_sample=False,
            pad_token_id=self._pad(),
        )[:, len(ask) :]
        conversations = []
        for tokens, prompt in zip(described, prompts, strict=True):
            description = self.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            # Tokenized with a digit, which then comes off: whether a space belongs to it is the tokenizer's affair.
            conversations.append(
                self._tokens(
                    "USER: ",
                    f"\n{_DESCRIBE[category]} ASSISTANT: {description} USER: {_GRADE.format(prompt=prompt)} "
                    "ASSISTANT: The grade is 1",
                )[:-1]
            )
        logits = self._last_logits(conversations, pixels)
        return [1 + int(i) for i in logits[:, self.digits].argmax(1)]

    def _last_logits(self, conversations: Sequence[Tensor], pixels: Tensor) -> Tensor:
        """[B, vocabulary]: what comes after each conversation. Padding lies behind, where no token looks."""
        ends = [len(c) - 1 for c in conversations]
        ids = pad_sequence(list(conversations), batch_first=True, padding_value=self._pad())
        mask = pad_sequence([torch.ones_like(c) for c in conversations], batch_first=True)
        hidden = self.model.model(input_ids=ids, attention_mask=mask, pixel_values=pixels).last_hidden_state
        logits: Tensor = self.model.get_output_embeddings()(hidden[torch.arange(len(ends)), ends])
        return logits

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id or 0)

    def _tokens(self, before: str, after: str) -> Tensor:
        """Token ids [T] of a conversation with the picture's place between `before` and `after`."""
        first = self.tokenizer(before).input_ids
        if self.tokenizer.eos_token_id is not None and first and first[-1] == self.tokenizer.eos_token_id:
            first = first[:-1]  # some tokenizers close what goes on
        second = self.tokenizer(after, add_special_tokens=False).input_ids
        return torch.tensor([*first, *[self.picture_token] * self.picture_tokens, *second], device=self.device)
