"""Teach the text encoders to read before the transformer learns to draw.

FLUX.1 hears its prompts through encoders that already know language; the small FLUX's start from noise, and the
velocity error teaches them word order (what is left of what, whose colour is whose) last of all. A minute of plain
reading first: from T5's state at each noun, which noun it is, what was said of it and where it stands; from CLIP's
pooled state, how many objects on which ground. The heads are thrown away.

Encoders that have only met red circles and blue stars learn pairs, not grammar: a blue circle then reads as something
in between, and shifts CLIP's one vector, which every block hears, to where none ever was. So in half of the captions
nouns, colours and textures give way to invented words, single characters that no caption contains, and what is said of
those has to be read as well; and CLIP's state has to stay when they do: what things are is left to T5's tokens.
Held-out combinations stay unread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.scenes import COLORS, SHAPES
from tritflow.scenes.grammar import Prompt
from tritflow.scenes.render import MAX_OBJECTS
from tritflow.training.data import LatentSet, tokenize
from tritflow.training.loop import Trainer
from tritflow.training.words import CLASSES, InventedWords, word_table

# T5's scores are not divided by the square root of the head's width; its query weights start that much smaller
# instead (6.9 times at width 48). Stepped like the rest, they outgrow the others, attention collapses to single tokens,
# and what was learned is a bag of words.
QUERY_RATE = 0.3
_KINDS, _HUES, _GRAINS = (len(real) + len(characters) for real, characters in CLASSES)
# At a noun: which one, its colour and texture or that none was named, how many, where.
_AT_NOUN = (_KINDS, _HUES + 1, _GRAINS + 1, MAX_OBJECTS, 3)
_POOLED = (MAX_OBJECTS + 1, 1)


def told_before(nouns: Tensor, words: Tensor) -> Tensor:
    """What was said of each noun: the last of `words` [B, L] (-1: no such word) since the noun before it, else -1."""
    place = torch.arange(nouns.shape[1], device=nouns.device).expand_as(nouns)
    before = F.pad(torch.where(nouns >= 0, place, -1).cummax(1).values[:, :-1], (1, 0), value=-1)
    last = torch.where(words >= 0, place, -1).cummax(1).values
    return torch.where((nouns >= 0) & (last > before), words.gather(1, last.clamp(min=0)), -1)


def named_objects(nouns: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Which object a noun means: the n-th noun the n-th object if its shape fits, else the first of that shape.

    Args:
        nouns: what each token names, -1 for other words [B, L].
        kind: [B, S, 3] of the scenes, shapes by what names them (`blends.named`).

    Returns:
        Slots [B, L] (0 where there is no noun) and how many objects of that shape the scene holds [B, L].
    """
    match = kind[:, None, :, 0] == nouns[..., None]
    order = ((nouns >= 0).cumsum(1) - 1).clamp(0, kind.shape[1] - 1)
    in_order = match.gather(2, order[..., None])[..., 0]
    return torch.where(in_order, order, match.int().argmax(-1)), match.sum(-1)


class Reader(nn.Module):
    """Heads over the states of both text encoders."""

    def __init__(self, text_width: int, pooled_width: int, tokenizers: tuple[Any, Any]) -> None:
        super().__init__()
        self.nouns: Tensor
        self.colors: Tensor
        self.textures: Tensor
        self.invented = InventedWords(*tokenizers)
        for name, (words, _) in zip(("nouns", "colors", "textures"), CLASSES, strict=True):
            self.register_buffer(name, word_table(tokenizers[1], words))
        # The words of blended and tinted scenes (`blends`, `tints`) are read as what they are.
        for table, real, (first, many) in (
            (self.nouns, SHAPES, InventedWords.nouns()),
            (self.colors, COLORS, InventedWords.colors()),
        ):
            table[self.invented.t5_invented[first : first + many]] = len(real) + torch.arange(many)
        self.at_noun = nn.Linear(text_width, sum(_AT_NOUN))
        self.at_end = nn.Linear(pooled_width, sum(_POOLED))

    def told(self, t5_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each token that is a noun names (shapes, then blends), and the colour and texture said of it; -1: none
        [B, L]."""
        nouns = self.nouns[t5_ids]
        return nouns, told_before(nouns, self.colors[t5_ids]), told_before(nouns, self.textures[t5_ids])

    def loss(
        self, states: Tensor, pooled: Tensor, t5_ids: Tensor, choice: Tensor, data: LatentSet, index: Tensor
    ) -> Tensor:
        """Error of what is read from T5's states [B, L, D] and CLIP's pooled state [B, P] of examples `index`, whose
        captions (T5's ids as they were, `t5_ids`) had words replaced as `choice` says."""
        kind, place = data.kind[index].long(), data.place[index]
        nouns, colors, textures = self.told(t5_ids)
        slots, many = named_objects(nouns, kind)
        weight = (many > 0) & (nouns >= 0)
        weight = weight / weight.sum().clamp(min=1)
        spot = place.gather(1, slots[..., None].expand(-1, -1, 3))
        shape, color, texture, count, where = self.at_noun(states.float()).split(_AT_NOUN, dim=-1)
        total = 8 * ((where - spot).square().sum(-1) * weight).sum()
        names, hues, grains = (self.invented.renamed(w, choice, i) for i, w in enumerate((nouns, colors, textures)))
        hues, grains = torch.where(hues < 0, _HUES, hues), torch.where(grains < 0, _GRAINS, grains)
        for logits, truth in ((shape, names), (color, hues), (texture, grains), (count, many - 1)):
            errors = F.cross_entropy(logits.flatten(0, 1), truth.clamp(min=0).flatten(), reduction="none")
            total = total + (errors.view_as(weight) * weight).sum()
        objects, ground = self.at_end(pooled.float()).split(_POOLED, dim=-1)
        total = total + F.cross_entropy(objects, (kind[..., 0] >= 0).sum(1))
        return total + (ground[:, 0] - data.ground[index]).square().mean()


def moved(pooled: Tensor, other: Tensor) -> Tensor:
    """How far pooled states [B, P] of the same captions in other words are apart, in shares of their variance."""
    spread = pooled.float().var(0).mean().detach()
    return (pooled.float() - other.float()).square().mean() / (2 * spread + 1e-6)


@torch.no_grad()
def reads(t5: Any, reader: Reader, data: LatentSet, t5_tokenizer: Any, count: int = 2048) -> dict[str, float]:
    """Shares of the first `count` captions' facts that T5's states tell rightly: `colors` said of a noun, and `sides`
    of two objects one of which is "left of" the other."""
    t5_ids = data.t5_ids[:count]
    _, color, _, _, where = reader.at_noun(t5(t5_ids).last_hidden_state.float()).split(_AT_NOUN, dim=-1)
    nouns, told, _ = reader.told(t5_ids)
    # "on the left of" alone is said of a place, with no noun after it: two nouns and "left of" make a relation.
    left, of = (t5_tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("left", "of"))
    relation = ((t5_ids[:, :-1] == left) & (t5_ids[:, 1:] == of)).any(1) & ((nouns >= 0).sum(1) == 2)
    x = where[relation][nouns[relation] >= 0][:, 0].view(-1, 2)
    return {
        "colors": float((color.argmax(-1) == told)[told >= 0].float().mean()),
        "sides": float((x[:, 0] < x[:, 1]).float().mean()),
    }


@torch.no_grad()
def reads_unseen(t5: Any, reader: Reader, prompts: Sequence[Prompt], tokenizers: tuple[Any, Any]) -> float:
    """Share of the nouns of held-out prompts whose shape, colour and texture T5's states tell rightly."""
    _, t5_ids = tokenize([p.text for p in prompts], *tokenizers)
    t5_ids = t5_ids.to(reader.nouns.device)
    shape, color, texture, _, _ = reader.at_noun(t5(t5_ids).last_hidden_state.float()).split(_AT_NOUN, dim=-1)
    nouns, colors, textures = reader.told(t5_ids)
    right = shape.argmax(-1) == nouns
    right &= color.argmax(-1) == torch.where(colors < 0, _HUES, colors)
    right &= texture.argmax(-1) == torch.where(textures < 0, _GRAINS, textures)
    return float(right[nouns >= 0].float().mean())


def learn_to_read(
    clip: Any,
    t5: Any,
    reader: Reader,
    data: LatentSet,
    *,
    seconds: float,
    batch: int = 1024,
    peak: float = 5e-4,
    encoder_rate: float = 1.0,
    graph: bool = True,
    log: Callable[[int, float, float], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Train both encoders and `reader` in place for `seconds`; returns the last smoothed error.

    `encoder_rate`: share of the learning rate for the encoders. The heads are always new, and what they say at first
    should not undo what encoders have learned before.
    """
    device = data.latents.device

    def loss() -> Tensor:
        index = torch.randint(len(data.latents), (batch,), device=device)
        clip_ids, t5_ids = data.clip_ids[index], data.t5_ids[index]
        choice = reader.invented.choose(batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            pooled = clip(reader.invented.replace(clip_ids, "clip", choice)).pooler_output
            others = reader.invented.replace(clip_ids, "clip", reader.invented.choose(batch, 1.0, 1.0))
            elsewhere = clip(others).pooler_output
            states = t5(reader.invented.replace(t5_ids, "t5", choice)).last_hidden_state
        return reader.loss(states, pooled, t5_ids, choice, data, index) + moved(pooled, elsewhere)

    parameters = [p for m in (clip, t5, reader) for p in m.parameters()]
    queries = [p for name, p in t5.named_parameters() if name.endswith("SelfAttention.q.weight")]
    slower = {QUERY_RATE * encoder_rate: queries}
    if encoder_rate != 1:
        taken = {id(p) for p in queries}
        slower[encoder_rate] = [p for m in (clip, t5) for p in m.parameters() if id(p) not in taken]
    trainer = Trainer(loss, parameters, slower=slower, peak=peak, ema=0.99, graph=graph)
    trainer.run(seconds, warmup=100, decay=0.3, report=log, clock=clock)
    trainer.load_average()
    return float(trainer.last)
