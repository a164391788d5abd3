"""Online states of a FLUX pipeline: its prompts encoded once, its scheduler's noise levels, its teacher beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tritflow.calibration.trajectories import seed_of
from tritflow.distillation.online import OnlineStates
from tritflow.distillation.sharded import Ranks
from tritflow.pipelines.dense import whole_teacher
from tritflow.pipelines.loading import generation_defaults
from tritflow.pipelines.teacher import jittered_sigmas, position_ids, sizes_of, token_grid

if TYPE_CHECKING:
    from tritflow.pipelines.quantize_job import Job

# Schedules that trajectories draw from.
SCHEDULES = 64
# Prompts encoded at a time.
ENCODED = 1024
# Share of the free memory that encoded prompts may take.
ROOM = 0.4


def online_states(job: Job) -> tuple[OnlineStates, Any]:
    """The states that `job.recipe.online` asks for, and the teacher's transformer (to be compiled, perhaps).

    Raises:
        ValueError: the encoded prompts don't fit beside the models, or the pool is empty.
    """
    ranks = Ranks.here()
    pipe = whole_teacher(job)
    recipe, device = job.recipe, job.device
    dtype = next(pipe.transformer.parameters()).dtype
    sizes = sizes_of(recipe.calibration, generation_defaults(pipe))
    prompts = _encode(job, pipe, sizes["max_sequence_length"])
    rows, columns = token_grid(pipe, sizes)
    shared = position_ids(pipe, sizes, device, dtype)
    shifts = [recipe.calibration.timestep_jitter * ((i + 0.5) / SCHEDULES - 0.5) for i in range(SCHEDULES)]
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    sigmas = jittered_sigmas(scheduler, rows * columns, recipe.online.num_inference_steps, shifts)
    transformer = pipe.transformer
    del pipe  # text encoders and VAE have done their part
    guided = bool(transformer.config.guidance_embeds)
    states = OnlineStates(
        lambda **kwargs: transformer(**kwargs, return_dict=False)[0],
        prompts,
        shared,
        sigmas.to(device),
        recipe.calibration.guidance_scales if guided else None,
        (rows * columns, transformer.config.in_channels),
        batch_size=_share(recipe.distillation.batch_size, ranks),
        batches=recipe.online.pool,
        student_share=recipe.online.student_share,
        early_share=recipe.online.early_share,
        early_steps=recipe.online.early_steps,
        mixed_share=recipe.online.mixed_share,
        dtype=dtype,
        # Each process has trajectories of its own.
        seed=recipe.distillation.seed if ranks.first else seed_of(recipe.distillation.seed, 2, ranks.rank),
    )
    return states, transformer


def _share(batch: int, ranks: Ranks) -> int:
    """Of a batch, for each process."""
    return len(ranks.part(torch.arange(batch)))


@torch.no_grad()
def _encode(job: Job, pipe: Any, length: int) -> dict[str, Tensor]:
    """Every prompt's text states [P, L, D] and pooled state [P, D'], on the job's device."""
    assert job.prompts is not None
    texts, found = job.prompts.texts, []
    for start in range(0, len(texts), ENCODED):
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=list(texts[start : start + ENCODED]), prompt_2=None, device=job.device, max_sequence_length=length
        )
        if not start and job.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(job.device)
            needed = (embeds.nbytes + pooled.nbytes) * len(texts) // len(embeds)
            if needed > ROOM * free:
                raise ValueError(
                    f"{len(texts)} encoded prompts take {needed / 1e9:.1f} GB, too much of the {free / 1e9:.1f} GB "
                    "free; give fewer prompts, or set online.pool = 0 to train on recorded trajectories"
                )
        found.append((embeds, pooled))
    embeds, pooled = (torch.cat(parts) for parts in zip(*found, strict=True))
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}
