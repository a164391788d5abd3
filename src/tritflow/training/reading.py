"""Teach the text encoders to read before the transformer learns to draw.

FLUX.1 hears its prompts through encoders that already know language; the small FLUX's start from noise, and the
velocity error teaches them word order (what is left of what, whose colour is whose) last of all. A minute of plain
reading first: from T5's state at each noun, what its object is and where it stands; from CLIP's pooled state, how
many of which shape, which colours, which ground. The heads are thrown away.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.scenes import COLORS, SHAPES, TEXTURES
from tritflow.scenes.grammar import PLURAL
from tritflow.scenes.render import MAX_OBJECTS
from tritflow.training.data import LatentSet
from tritflow.training.loop import Trainer

# T5's scores are not divided by the square root of the head's width; its query weights start that much smaller
# instead (6.9 times at width 48). Stepped like the rest, they outgrow the others, attention collapses to single tokens,
# and what was learned is a bag of words.
QUERY_RATE = 0.3
_NOUN = (len(COLORS), len(TEXTURES), MAX_OBJECTS, 3)
_POOLED = (len(SHAPES) * (MAX_OBJECTS + 1), len(COLORS), 1)


def noun_table(t5_tokenizer: Any) -> Tensor:
    """Shape index of every token id of a word-level tokenizer, -1 where the token names no shape."""
    table = torch.full((len(t5_tokenizer),), -1)
    for index, shape in enumerate(SHAPES):
        for word in (shape, PLURAL[shape]):
            token = t5_tokenizer.convert_tokens_to_ids(f"▁{word}")
            if token != t5_tokenizer.unk_token_id:
                table[token] = index
    return table


def named_objects(nouns: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """Which object a noun means: the n-th noun the n-th object if its shape fits, else the first of that shape.

    Args:
        nouns: shape index of each token, -1 for other words [B, L].
        kind: [B, S, 3] of the scenes.

    Returns:
        Slots [B, L] (0 where there is no noun) and how many objects of that shape the scene holds [B, L].
    """
    match = kind[:, None, :, 0] == nouns[..., None]
    order = ((nouns >= 0).cumsum(1) - 1).clamp(0, kind.shape[1] - 1)
    in_order = match.gather(2, order[..., None])[..., 0]
    return torch.where(in_order, order, match.int().argmax(-1)), match.sum(-1)


class Reader(nn.Module):
    """Heads over the states of both text encoders."""

    def __init__(self, text_width: int, pooled_width: int, nouns: Tensor) -> None:
        super().__init__()
        self.nouns: Tensor
        self.register_buffer("nouns", nouns)
        self.at_noun = nn.Linear(text_width, sum(_NOUN))
        self.at_end = nn.Linear(pooled_width, sum(_POOLED))

    def loss(self, states: Tensor, pooled: Tensor, t5_ids: Tensor, data: LatentSet, index: Tensor) -> Tensor:
        """Error of what is read from T5's states [B, L, D] and CLIP's pooled state [B, P] of examples `index`."""
        kind, place = data.kind[index].long(), data.place[index]
        nouns = self.nouns[t5_ids]
        slots, many = named_objects(nouns, kind)
        weight = (many > 0) & (nouns >= 0)
        weight = weight / weight.sum().clamp(min=1)
        facts, spot = (v.gather(1, slots[..., None].expand(-1, -1, 3)) for v in (kind, place))
        color, texture, count, where = self.at_noun(states.float()).split(_NOUN, dim=-1)
        total = 8 * ((where - spot).square().sum(-1) * weight).sum()
        for logits, truth in ((color, facts[..., 1]), (texture, facts[..., 2]), (count, many - 1)):
            errors = F.cross_entropy(logits.flatten(0, 1), truth.clamp(min=0).flatten(), reduction="none")
            total = total + (errors.view_as(weight) * weight).sum()
        counts, colors, ground = self.at_end(pooled.float()).split(_POOLED, dim=-1)
        shapes = torch.arange(len(SHAPES), device=kind.device)
        present = (kind[..., 0, None] == shapes).sum(1)
        total = total + F.cross_entropy(counts.reshape(-1, MAX_OBJECTS + 1), present.flatten())
        hues = (kind[..., 1, None] == torch.arange(len(COLORS), device=kind.device)).any(1).float()
        total = total + F.binary_cross_entropy_with_logits(colors, hues)
        return total + (ground[:, 0] - data.ground[index]).square().mean()


@torch.no_grad()
def reads(t5: Any, reader: Reader, data: LatentSet, t5_tokenizer: Any, count: int = 2048) -> dict[str, float]:
    """Shares of the first `count` captions' facts that T5's states tell rightly: `colors` where the word before the
    noun names it, `sides` of two objects one of which is "left of" the other."""
    t5_ids = data.t5_ids[:count]
    color, _, _, where = reader.at_noun(t5(t5_ids).last_hidden_state.float()).split(_NOUN, dim=-1)
    names = torch.full_like(reader.nouns, -1)
    for index, word in enumerate(COLORS):
        names[t5_tokenizer.convert_tokens_to_ids(f"▁{word}")] = index
    at_noun = reader.nouns[t5_ids] >= 0
    told = torch.cat([torch.full_like(t5_ids[:, :1], -1), names[t5_ids][:, :-1]], dim=1)
    named = at_noun & (told >= 0)
    # "on the left of" alone is said of a place, with no noun after it: two nouns and "left of" make a relation.
    left, of = (t5_tokenizer.convert_tokens_to_ids(f"▁{word}") for word in ("left", "of"))
    relation = ((t5_ids[:, :-1] == left) & (t5_ids[:, 1:] == of)).any(1) & (at_noun.sum(1) == 2)
    x = where[relation][at_noun[relation]][:, 0].view(-1, 2)
    return {
        "colors": float((color.argmax(-1) == told)[named].float().mean()),
        "sides": float((x[:, 0] < x[:, 1]).float().mean()),
    }


def learn_to_read(
    clip: Any,
    t5: Any,
    reader: Reader,
    data: LatentSet,
    *,
    seconds: float,
    batch: int = 1024,
    peak: float = 5e-4,
    graph: bool = True,
    log: Callable[[int, float, float], None] | None = None,
) -> float:
    """Train both encoders and `reader` in place for `seconds`; returns the last smoothed error."""
    device = data.latents.device

    def loss() -> Tensor:
        index = torch.randint(len(data.latents), (batch,), device=device)
        t5_ids = data.t5_ids[index]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            pooled = clip(data.clip_ids[index]).pooler_output
            states = t5(t5_ids).last_hidden_state
        return reader.loss(states, pooled, t5_ids, data, index)

    parameters = [p for m in (clip, t5, reader) for p in m.parameters()]
    queries = [p for name, p in t5.named_parameters() if name.endswith("SelfAttention.q.weight")]
    trainer = Trainer(loss, parameters, slower={QUERY_RATE: queries}, peak=peak, ema=0.99, graph=graph)
    trainer.run(seconds, warmup=100, decay=0.3, report=log)
    trainer.load_average()
    return float(trainer.last)
