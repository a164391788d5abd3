"""Train the transformer by flow matching, and distil guidance into its embedding. Text encoders stay as they are.

x_t = (1 - sigma) x_0 + sigma eps, target velocity v = eps - x_0 (rectified flow, as FLUX.1); the transformer receives
sigma as its `timestep`. Guidance: v = v_empty + w (v_prompt - v_empty) (classifier-free guidance, Ho & Salimans 2022),
taught to the guidance embedding in the last phase (Meng et al. 2023, "On distillation of guided diffusion models").
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.training.data import LatentSet
from tritflow.training.loop import Trainer
from tritflow.training.patches import PatchHead
from tritflow.training.words import InventedWords

CAPTION_DROPOUT = 0.1
# Share of captions in which some words give way to invented ones, and share of those captions' words. "Three A" over
# three rings teaches three of anything; where the shape is always named, the blocks learn three of this and two of
# that by heart, and a combination they never met comes out as one they did.
INVENTED_CAPTIONS, INVENTED_WORDS = 0.3, 0.5
# Weight of the patch head's error beside the velocity's, while the learning rate is at its peak; it fades with it.
PATCH_WEIGHT = 0.1
# Muon steps are of one size whatever the gradient: without decay, directions that nothing needs grow all the same.
MATRIX_DECAY = 0.1


class SmallFlux(nn.Module):
    """Text encoders and transformer as one module: tokens and latents in, velocity out."""

    def __init__(self, clip: Any, t5: Any, transformer: Any) -> None:
        super().__init__()
        self.clip, self.t5, self.transformer = clip, t5, transformer

    def text(self, clip_ids: Tensor, t5_ids: Tensor) -> tuple[Tensor, Tensor]:
        """States [B, L, D] and pooled state [B, P], as FluxPipeline takes them (no attention mask)."""
        pooled = self.clip(clip_ids).pooler_output
        return self.t5(t5_ids).last_hidden_state, pooled

    def velocity(self, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor, side: int) -> Tensor:
        """Velocity [B, T, C] of packed latents x at noise level sigma [B], guided by `guidance` [B]."""
        states, pooled = text
        return self.transformer(
            hidden_states=x,
            encoder_hidden_states=states,
            pooled_projections=pooled,
            timestep=sigma,
            guidance=guidance,
            txt_ids=torch.zeros(states.shape[1], 3, device=x.device),
            img_ids=image_ids(side, x.device),
            return_dict=False,
        )[0]

    def velocity_and_tokens(
        self, x: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor], guidance: Tensor, side: int
    ) -> tuple[Tensor, Tensor]:
        """What `velocity` gives, and the image tokens [B, T, hidden] two thirds of the way through the blocks."""
        m = self.transformer
        states, pooled = text
        tokens = m.x_embedder(x)
        # In the tokens' type, as the stock forward has it: sampling sees these very roundings.
        embedded = m.time_text_embed(sigma.to(tokens.dtype) * 1000, guidance.to(tokens.dtype) * 1000, pooled)
        states = m.context_embedder(states)
        rotary = m.pos_embed(torch.cat([torch.zeros(states.shape[1], 3, device=x.device), image_ids(side, x.device)]))
        blocks = [*m.transformer_blocks, *m.single_transformer_blocks]
        middle = tokens
        for number, block in enumerate(blocks):
            states, tokens = block(
                hidden_states=tokens,
                encoder_hidden_states=states,
                temb=embedded,
                image_rotary_emb=rotary,
                joint_attention_kwargs=None,
            )
            if number + 1 == len(blocks) * 2 // 3:
                middle = tokens
        return m.proj_out(m.norm_out(tokens, embedded)), middle


def image_ids(side: int, device: torch.device) -> Tensor:
    """Position ids [side^2, 3] of packed latents."""
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1] = torch.arange(side, device=device)[:, None]
    ids[..., 2] = torch.arange(side, device=device)[None, :]
    return ids.view(-1, 3)


def shift_of(side: int) -> float:
    """How far noise levels move up for `side` x `side` image tokens: 1 for 8 x 8, 2 for 16 x 16. The same picture in
    more tokens shows through more noise (Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23)."""
    return max(1.0, side / 8)


def shifted(sigma: Tensor, shift: float) -> Tensor:
    """Noise levels moved as diffusers' flow-matching scheduler moves them."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(batch: int, device: torch.device, shift: float = 1.0) -> Tensor:
    """Noise levels: logit-normal in the noisier half, where layout is decided; a tenth uniform; then shifted."""
    normal = torch.sigmoid(1.1 * torch.randn(batch, device=device) + 0.7)
    uniform = torch.rand(batch, device=device)
    sigma = torch.where(torch.rand(batch, device=device) < 0.1, uniform, normal)
    return shifted(sigma, shift).clamp(1e-3, 1 - 1e-3)


def flow_loss(
    model: SmallFlux,
    data: LatentSet,
    batch: int,
    side: int,
    head: PatchHead,
    share: Tensor,
    words: InventedWords | None = None,
    *,
    nouns: bool = True,
    colors: bool = True,
) -> Callable[[], Tensor]:
    """A closure that draws a batch and returns the velocity error plus `share` (of its weight) of the patch head's;
    a tenth of the captions are dropped, and with `words` some are told in invented ones, `nouns` and `colors` among
    them unless those mean something by themselves (blends and hues)."""
    device = data.latents.device

    def loss() -> Tensor:
        index = torch.randint(len(data.latents), (batch,), device=device)
        x0 = data.latents[index].float()
        drop = (torch.rand(batch, 1, device=device) < CAPTION_DROPOUT).long()
        clip_ids = data.clip_ids[index] * (1 - drop) + data.empty_clip * drop
        t5_ids = data.t5_ids[index] * (1 - drop) + data.empty_t5 * drop
        if words is not None:
            choice = words.choose(batch, INVENTED_CAPTIONS, INVENTED_WORDS, nouns=nouns, colors=colors)
            clip_ids, t5_ids = words.replace(clip_ids, "clip", choice), words.replace(t5_ids, "t5", choice)
        noise = torch.randn_like(x0)
        sigma = draw_sigma(batch, device, shift_of(side))
        x = x0 + sigma[:, None, None] * (noise - x0)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            guidance = torch.ones(batch, device=device)
            with torch.no_grad():
                text = model.text(clip_ids, t5_ids)
            v, middle = model.velocity_and_tokens(x, sigma, text, guidance, side)
        seen = head.loss(middle.float(), data.kind[index].long(), data.place[index])
        return (v.float() - (noise - x0)).square().mean() + PATCH_WEIGHT * share * seen

    return loss


def block_matrices(transformer: Any) -> list[nn.Parameter]:
    """The 2-D weights inside the blocks: what Muon takes."""
    return [
        p
        for name, p in transformer.named_parameters()
        if p.ndim == 2 and name.startswith(("transformer_blocks.", "single_transformer_blocks."))
    ]


def train_flow(
    model: SmallFlux,
    data: LatentSet,
    *,
    seconds: float,
    side: int,
    batch: int = 512,
    peak: float = 1e-3,
    muon: bool = True,
    decay: float = 0.3,
    synchronize: bool = True,
    compile: bool = True,
    graph: bool = True,
    words: InventedWords | None = None,
    nouns: bool = True,
    colors: bool = True,
    log: Callable[[int, float, float], None] | None = None,
    box: list[Trainer] | None = None,
) -> Trainer:
    """Train in place for `seconds`; afterwards the parameters hold the averaged weights. The trainer is put into `box`
    at once, for `log` to look at. `words`, `nouns` and `colors`: for `flow_loss`."""
    if compile:
        model.transformer.compile_repeated_blocks(fullgraph=True)
    device = data.latents.device
    head = PatchHead(model.transformer.inner_dim).to(device)
    share = torch.zeros((), device=device)
    trainer = Trainer(
        flow_loss(model, data, batch, side, head, share, words, nouns=nouns, colors=colors),
        [p for m in (model, head) for p in m.parameters() if p.requires_grad],
        matrices=block_matrices(model.transformer) if muon else (),
        matrix_decay=MATRIX_DECAY,
        share=share,
        peak=peak,
        ema=0.9995,
        synchronize=synchronize,
        graph=graph,
    )
    if box is not None:
        box.append(trainer)
    trainer.run(seconds, warmup=300, decay=decay, report=log)
    trainer.load_average()
    return trainer


def distil_guidance(
    model: SmallFlux,
    data: LatentSet,
    *,
    seconds: float,
    side: int,
    batch: int = 512,
    peak: float = 4e-4,
    scales: tuple[float, float] = (1.0, 5.0),
    muon: bool = True,
    compile: bool = True,
    graph: bool = True,
    log: Callable[[int, float, float], None] | None = None,
) -> None:
    """Teach the guidance embedding: one forward at `guidance = w` equals the guided pair of the model as it is now.

    The text encoders stay as they are; the transformer changes in place.
    """
    device = data.latents.device
    teacher = copy.deepcopy(model).requires_grad_(False)
    if compile:
        teacher.transformer.compile_repeated_blocks(fullgraph=True)
    model.clip.requires_grad_(False)
    model.t5.requires_grad_(False)

    def loss() -> Tensor:
        index = torch.randint(len(data.latents), (batch,), device=device)
        x0 = data.latents[index].float()
        noise = torch.randn_like(x0)
        sigma = draw_sigma(batch, device, shift_of(side))
        x = x0 + sigma[:, None, None] * (noise - x0)
        w = scales[0] + (scales[1] - scales[0]) * torch.rand(batch, device=device)
        one = torch.ones(batch, device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False):
            with torch.no_grad():
                text = teacher.text(data.clip_ids[index], data.t5_ids[index])
                empty = teacher.text(data.empty_clip, data.empty_t5)
                blank = (empty[0].expand_as(text[0]), empty[1].expand_as(text[1]))
                prompted = teacher.velocity(x, sigma, text, one, side).float()
                unprompted = teacher.velocity(x, sigma, blank, one, side).float()
                target = unprompted + w[:, None, None] * (prompted - unprompted)
            v = model.velocity(x, sigma, text, w, side)
        return (v.float() - target).square().mean()

    parameters = list(model.transformer.parameters())
    trainer = Trainer(
        loss,
        parameters,
        matrices=block_matrices(model.transformer) if muon else (),
        matrix_decay=MATRIX_DECAY,
        peak=peak,
        ema=0.999,
        graph=graph,
    )
    trainer.run(seconds, warmup=100, decay=0.5, report=log)
    trainer.load_average()


@torch.no_grad()
def sample(
    model: SmallFlux,
    clip_ids: Tensor,
    t5_ids: Tensor,
    empty: tuple[Tensor, Tensor],
    *,
    side: int,
    channels: int,
    steps: int = 28,
    guidance: float = 1.0,
    true_guidance: float = 1.0,
    shift: float = 1.0,
    seed: int = 0,
) -> Tensor:
    """Euler sampling [B, T, C]; `true_guidance` other than 1 runs the guided pair, `guidance` feeds the embedding."""
    device = clip_ids.device
    generator = torch.Generator(device=device).manual_seed(seed)
    batch = clip_ids.shape[0]
    x = torch.randn(batch, side * side, channels, device=device, generator=generator)
    sigmas = torch.linspace(1, 1 / steps, steps, device=device)
    sigmas = torch.cat([shifted(sigmas, shift), torch.zeros(1, device=device)])
    w = torch.full((batch,), guidance, device=device)
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        text = model.text(clip_ids, t5_ids)
        blank_one = model.text(*empty)
        blank = (blank_one[0].expand_as(text[0]), blank_one[1].expand_as(text[1]))
        for a, b in itertools.pairwise(sigmas):
            t = a.expand(batch)
            v = model.velocity(x, t, text, w, side).float()
            if true_guidance != 1.0:
                u = model.velocity(x, t, blank, w, side).float()
                v = u + true_guidance * (v - u)
            x = x + (b - a) * v
    return x
