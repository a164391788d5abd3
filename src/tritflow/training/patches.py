"""What stands at each patch of a picture, told to the transformer while it learns to draw.

The velocity error hardly rewards putting the right object in the right place: most of it is texture and edges. So
during training alone a small head reads shape, colour, texture and place of the object under every patch from the
image tokens half way through the blocks. The idea is that of representation alignment (Yu et al. 2024,
"Representation Alignment for Generation"), with the world's own facts in place of a pretrained encoder's features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tritflow.scenes import COLORS, TEXTURES
from tritflow.training.words import CLASSES

# Shapes are all that a noun names, blends too (`blends.named`), and the ground.
_SPLIT = (sum(len(nouns) for nouns in CLASSES[0]) + 1, len(COLORS), len(TEXTURES), 3)


def patch_owners(kind: Tensor, place: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """The object in front at the centre of each of side x side patches.

    Args:
        kind: [B, S, 3] shape, colour, texture; shape -1 is an empty slot (`blends.named`).
        place: [B, S, 3] x, y, radius in shares of the picture.
        side: patches a row.

    Returns:
        Slots [B, side^2], -1 for the ground; and offset from the patch to the object's centre in radii with the
        radius itself [B, side^2, 3] (zeros on the ground).
    """
    axis = (torch.arange(side, device=kind.device) + 0.5) / side
    x, y = axis.repeat(side), axis.repeat_interleave(side)
    slots = torch.full((len(kind), side * side), -1, device=kind.device)
    offset = torch.zeros(len(kind), side * side, 3, device=kind.device)
    for slot in range(kind.shape[1]):  # painter's order: later slots cover earlier ones
        cx, cy, radius = (v[:, None] for v in place[:, slot].unbind(-1))
        safe = radius.clamp(min=1e-3)
        dx, dy = (cx - x) / safe, (cy - y) / safe
        inside = (torch.maximum(dx.abs(), dy.abs()) < 1) & (kind[:, slot, :1] >= 0)
        slots = torch.where(inside, slot, slots)
        here = torch.stack([dx, dy, radius.expand_as(dx) * 4], dim=-1)
        offset = torch.where(inside[..., None], here, offset)
    return slots, offset


class PatchHead(nn.Module):
    """Reads the owner of each patch from image tokens [B, T, width]; used while training alone."""

    def __init__(self, width: int, hidden: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, sum(_SPLIT))
        )

    def loss(self, tokens: Tensor, kind: Tensor, place: Tensor) -> Tensor:
        """Cross-entropy of shape (ground included) over all patches, of colour and texture and the error of the
        centre over patches that an object owns; [B, T, width] tokens of a square picture."""
        shape, color, texture, centre = self.layers(tokens).float().split(_SPLIT, dim=-1)
        slots, offset = patch_owners(kind, place, round(tokens.shape[1] ** 0.5))
        owned = slots >= 0
        facts = kind.gather(1, slots.clamp(min=0)[..., None].expand(-1, -1, 3))
        total = F.cross_entropy(shape.flatten(0, 1), torch.where(owned, facts[..., 0] + 1, 0).flatten())
        weight = owned / owned.sum().clamp(min=1)
        for logits, truth in ((color, facts[..., 1]), (texture, facts[..., 2])):
            errors = F.cross_entropy(logits.flatten(0, 1), truth.flatten().clamp(min=0), reduction="none")
            total = total + 0.5 * (errors.view_as(weight) * weight).sum()
        return total + 0.5 * ((centre - offset).square().mean(-1) * weight).sum()
