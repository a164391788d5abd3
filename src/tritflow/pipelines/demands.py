"""What a recipe asks of the machine, said before hours of work: the teacher, memory, disk."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from tritflow.config import Recipe, bytes_text
from tritflow.formats.environment import free_bytes, machine_bytes


class QuantizeError(ValueError):
    """The source, the output folder or the combination of options cannot work. Says which and what to do."""


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a recipe runs the model (for its activations, or to distil), instead of streaming weights."""
    trained = recipe.reconstruction.steps > 0 or recipe.distillation.steps > 0
    return recipe.compensation or recipe.smoothing is not None or trained


def replicated(recipe: Recipe) -> bool:
    """Whether each of several processes holds the whole student: Muon takes whole matrices, and the teacher of a pool
    is whole beside it anyway."""
    return recipe.online.pool > 0 or recipe.distillation.optimizer == "muon"


def training_bytes(recipe: Recipe, weights: int) -> int:
    """What end-to-end distillation of so many weights keeps on one device beside its activations; 0 without it.

    fp32 latent weights, gradients, and one moment (Muon) or two (AdamW); lean, latent weights and one moment in bf16;
    a byte where trits stand still; nothing where latent weights are offloaded; and the teacher's weights where it
    trains on states made meanwhile.
    """
    config = recipe.distillation
    if not config.steps:
        return 0
    each = 4 * (3 if config.optimizer == "muon" else 4)
    if config.lean:
        each = 4
    if not config.learning_rate:
        each = 1
    if offloaded_bytes(recipe, weights):
        each = 0  # but for a block's
    return (each + (2 if recipe.online.pool and each <= 4 else 0)) * weights


def offloaded_bytes(recipe: Recipe, weights: int) -> int:
    """What end-to-end distillation keeps in the machine's memory instead: bf16 latent weights and momenta, or 0."""
    return 4 * weights if recipe.distillation.steps and recipe.streaming.latent_store == "ram" else 0


def check_memory(recipe: Recipe, weights: int, device: torch.device) -> None:
    """Say before hours of calibration that distillation will not fit.

    Raises `QuantizeError` with what it takes, what there is, and what fits.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    offloaded, memory = world * offloaded_bytes(recipe, weights), machine_bytes()
    if memory is not None and offloaded > memory:
        raise QuantizeError(
            f"recipe '{recipe.name}' keeps {bytes_text(offloaded)} of latent weights and momenta in memory "
            f"(streaming.latent_store), and this machine has {bytes_text(memory)}; take --recipe large"
        )
    needed = training_bytes(recipe, weights)
    if not needed or device.type != "cuda":
        return
    cards = 1 if replicated(recipe) else world
    there = torch.cuda.get_device_properties(device).total_memory
    if needed > cards * there:
        lean = f"{4e-9 * weights:.0f} GB"  # of either
        raise QuantizeError(
            f"recipe '{recipe.name}' distils {weights / 1e9:.1f} G weights end to end, which takes {needed / 1e9:.0f} "
            f"GB, and {cards} x {device} has {cards * there / 1e9:.0f} GB; take --recipe large-distilled ({lean}), "
            f"large-offloaded ({lean} of the machine's memory instead) or large (block by block)"
        )


def checkpoint_bytes(recipe: Recipe, weights: int) -> int:
    """The most that distillation's checkpoints take on the disk: the last one, the best one, and the next while it is
    written. Latent weights and moments; the dense rest is small.
    """
    config = recipe.distillation
    if not config.steps or not config.learning_rate:
        return 0
    each = 4 if config.lean else 4 * (2 if config.optimizer == "muon" else 3)
    written = -(-config.steps // config.checkpoint_every) if config.checkpoint_every else 1
    return min(3, written) * each * weights


def check_disk(recipe: Recipe, weights: int, work: Path) -> None:
    """Say before hours of calibration that checkpoints will not fit on the disk of `work`; those that are there count.

    Raises `QuantizeError` with what they take and what is free.
    """
    there = {f.stat().st_ino: f.stat().st_size for f in (work / "distilled").glob("*") if f.is_file()}
    needed = checkpoint_bytes(recipe, weights) - sum(there.values())
    free = free_bytes(work)
    if needed > free:
        raise QuantizeError(
            f"recipe '{recipe.name}' keeps up to {bytes_text(needed)} of checkpoints under {work}, and "
            f"{bytes_text(free)} are free there; free some, give an OUT on another disk, or write "
            "one checkpoint alone, at the end: --set distillation.checkpoint_every=0"
        )
