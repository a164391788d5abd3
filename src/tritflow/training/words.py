"""Invented words: single characters that no caption contains, in the place of nouns, colours and textures.

Those of nouns and colours are runes, which both tokenizers read as one token wherever one stands: a text can say them.
One is written right behind the word before it ("two redᚠ"), so that no token for a space comes between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.scenes import COLORS, SHAPES, TEXTURES
from tritflow.scenes.grammar import PLURAL
from tritflow.training.models import RUNES

# What has a word, and the characters that stand for invented ones. (Those of textures are only said in token ids.)
CLASSES = (
    (tuple((shape, PLURAL[shape]) for shape in SHAPES), RUNES[:24]),
    (tuple((color,) for color in COLORS), RUNES[24:36]),
    (tuple((texture,) for texture in TEXTURES), "bcdfghjk"),
)


def word_table(tokenizer: Any, words: Sequence[Sequence[str]], form: str = "▁{}") -> Tensor:
    """Index among `words`, each with its forms, of every token id of a word-level tokenizer; -1 for other tokens."""
    table = torch.full((len(tokenizer),), -1)
    for index, forms in enumerate(words):
        for word in forms:
            token = tokenizer.convert_tokens_to_ids(form.format(word))
            if token != tokenizer.unk_token_id:
                table[token] = index
    return table


class InventedWords(nn.Module):
    """Puts invented words in the place of a caption's nouns, colours and textures, the same wherever one stands.

    Numbers of words: the real ones of all classes, one class after the other; so are those of invented ones.
    """

    def __init__(self, clip_tokenizer: Any, t5_tokenizer: Any) -> None:
        super().__init__()
        self.t5_table: Tensor
        self.t5_invented: Tensor
        words = [forms for real, _ in CLASSES for forms in real]
        characters = "".join(invented for _, invented in CLASSES)
        for name, tokenizer, form, character in (
            ("t5", t5_tokenizer, "▁{}", "{}"),
            ("clip", clip_tokenizer, "{}</w>", "{}</w>"),
        ):
            said = [c if c in RUNES else character.format(c) for c in characters]
            invented = [tokenizer.convert_tokens_to_ids(token) for token in said]
            self.register_buffer(f"{name}_table", word_table(tokenizer, words, form))
            self.register_buffer(f"{name}_invented", torch.tensor(invented))

    @staticmethod
    def nouns() -> tuple[int, int]:
        """Number of the first invented noun, and how many there are."""
        return 0, len(CLASSES[0][1])

    @staticmethod
    def colors() -> tuple[int, int]:
        """Number of the first invented word for a colour, and how many there are."""
        return len(CLASSES[0][1]), len(CLASSES[1][1])

    @staticmethod
    def none(batch: int) -> Tensor:
        """A choice that changes no word [batch, words]."""
        return torch.full((batch, sum(len(real) for real, _ in CLASSES)), -1)

    def choose(
        self, batch: int, captions: float = 0.5, words: float = 2 / 3, *, nouns: bool = True, colors: bool = True
    ) -> Tensor:
        """For each word of each caption the number of an invented one, or -1: it stays [batch, words].

        Args:
            captions: share of them that are changed at all.
            words: share of a changed caption's words that are.
            nouns: whether nouns may be.
            colors: whether words for colours may be.
        """
        device = self.t5_table.device
        columns, first = [], 0
        for number, (real, characters) in enumerate(CLASSES):
            # A different one for each word: two nouns never become the same.
            some = torch.rand(batch, len(characters), device=device).argsort(1)[:, : len(real)] + first
            columns.append(some if (nouns, colors, True)[number] else torch.full_like(some, -1))
            first += len(characters)
        chosen = torch.cat(columns, 1)
        changed = torch.rand(batch, 1, device=device) < captions
        return torch.where(changed & (torch.rand(chosen.shape, device=device) < words), chosen, -1)

    def replace(self, ids: Tensor, which: str, choice: Tensor) -> Tensor:
        """Token ids [B, L] of the tokenizer `which` ("clip" or "t5") with the chosen words in their places."""
        table, invented = getattr(self, f"{which}_table"), getattr(self, f"{which}_invented")
        word = table[ids]
        other = choice.gather(1, word.clamp(min=0))
        return torch.where((word >= 0) & (other >= 0), invented[other.clamp(min=0)], ids)

    def text(self, clip_ids: Sequence[int], tokenizer: Any) -> str:
        """What the token ids of one caption say, without marks and padding, in a text that gives the same ids again."""
        said = ""
        for token in tokenizer.convert_ids_to_tokens(list(clip_ids), skip_special_tokens=True):
            word = token.removesuffix("</w>")
            said += word if not said or word in RUNES or word == "," else " " + word
        return said

    @staticmethod
    def renamed(index: Tensor, choice: Tensor, which: int) -> Tensor:
        """What words `index` [B, ...] of class `which` (-1: none) are after `choice`: the real ones of the class keep
        their numbers, invented ones come after them and stay what they are."""
        begin = sum(len(real) for real, _ in CLASSES[:which])
        first = sum(len(characters) for _, characters in CLASSES[:which])
        real = len(CLASSES[which][0])
        other = choice[:, begin : begin + real].gather(1, index.clamp(0, real - 1).flatten(1)).view_as(index)
        changed = (index >= 0) & (index < real) & (other >= 0)
        return torch.where(changed, other - first + real, index)
