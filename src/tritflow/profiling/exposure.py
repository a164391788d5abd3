"""How wrong a student's velocity is where its teacher goes, and where it goes itself, sampler step by sampler step.

A student that learns on its teacher's states alone is never shown where its own errors lead (exposure bias: Ranzato et
al., 2016; for imitation in general Ross et al., 2011). Both models start from the same noise; once the sampler follows
the teacher, once the student, and at each state the student is compared with what the teacher says there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tritflow.calibration.trajectories import Trajectories
from tritflow.config import CalibrationConfig
from tritflow.profiling.sensitivity import prompts_of
from tritflow.results import provenance

WHOSE = ("teacher", "student")


def measure(
    model: str,
    against: str,
    *,
    prompts: str | Path | Sequence[str] | None = None,
    num_prompts: int = 64,
    num_inference_steps: int = 28,
    guidance_scale: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    mode: str | None = None,
    label: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Measure one student against its teacher; one run for `results.append`.

    Args:
        model, against: student and teacher, as `load_pipeline` takes them.
        prompts: a file, texts, or None for the teacher folder's `calibration_prompts.txt`.
        num_prompts, num_inference_steps, guidance_scale: trajectories and their steps (guidance None: the folder's).
        batch_size: pairs run at once.
        seed: of noise and choice of prompts.
        mode: w2a16 or w2a8 of a ternary student.
        label: name of the run in figures (None: the student's).
        progress: called as (trajectories done, of how many), both kinds together.

    Returns:
        `timesteps` [S] from 1 (noise) on, and by whose states they are (`teacher`, `student`) `mean` and `median` [S]:
        of the mean square error of the velocity over trajectories.

    Raises:
        SensitivityError: no prompts.
    """
    from tritflow.pipelines.loading import generation_defaults, load_pipeline, quiet
    from tritflow.pipelines.teacher import record_trajectories

    with quiet():
        teacher = load_pipeline(against, device=device, dtype=dtype)
        # Whose text encoders it has does not matter: only its transformer runs.
        student = load_pipeline(model, base=against, device=device, dtype=dtype, mode=mode)
    for pipe in (teacher, student):
        pipe.set_progress_bar_config(disable=True)
    guidance = generation_defaults(teacher).guidance_scale if guidance_scale is None else guidance_scale
    chosen = prompts_of(teacher, prompts)
    config = CalibrationConfig(
        num_prompts=min(num_prompts, len(chosen)),
        num_inference_steps=num_inference_steps,
        guidance_scales=(guidance,),
        timestep_jitter=0.0,
        batch_size=batch_size,
        seed=seed,
    )

    def follows(**kwargs: Any) -> Tensor:
        velocity: Tensor = student.transformer(**{**kwargs, "return_dict": False})[0]
        return velocity

    errors: dict[str, Tensor] = {}
    timesteps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="tritflow-exposure-") as folder:
        for number, whose in enumerate(WHOSE):
            before = number * config.num_prompts
            trajectories = record_trajectories(
                teacher,
                chosen,
                Path(folder) / whose,
                config,
                driver=follows if whose == "student" else None,
                on_progress=None if progress is None else lambda done, n: progress(before + done, 2 * n),  # noqa: B023
            )
            errors[whose], timesteps = velocity_errors(student.transformer, trajectories, batch_size)
    return {
        "label": label or Path(model).name,
        "model": Path(model).name,
        "against": Path(against).name,
        "mode": mode,
        "prompts": chosen.sample(config.num_prompts, config.seed).describe(),
        "trajectories": config.num_prompts,
        "seed": seed,
        "guidance_scale": guidance,
        "num_inference_steps": num_inference_steps,
        "timesteps": [round(t, 4) for t in timesteps],
        "states": {
            whose: {
                "mean": [round(e, 6) for e in error.mean(0).tolist()],
                "median": [round(e, 6) for e in error.quantile(0.5, dim=0).tolist()],
            }
            for whose, error in errors.items()
        },
        **provenance(str(student._execution_device)),
    }


@torch.no_grad()
def velocity_errors(model: nn.Module, trajectories: Trajectories, batch_size: int) -> tuple[Tensor, list[float]]:
    """Mean square error [trajectories, steps] of a model's velocity against the recorded one, and every step's time."""
    device = next(model.parameters()).device
    found, times = [], []
    for part in torch.arange(trajectories.size("all")).split(batch_size):
        batch = trajectories.pairs(part, "all", device)
        velocity = model(**{**batch.kwargs, "return_dict": False})[0].float()
        found.append((velocity - batch.velocity).square().flatten(1).mean(1).cpu())
        times.append(batch.kwargs["timestep"].float().cpu())
    steps = trajectories.steps
    return torch.cat(found).view(-1, steps), torch.cat(times)[:steps].tolist()


def table(run: dict[str, Any]) -> str:
    """Step by step, and the mean over all, in plain text."""
    lines = [
        f"{run['label']} against {run['against']}: mean square error of the velocity, "
        f"{run['trajectories']} trajectories, guidance {run['guidance_scale']:g}, {run['device']}",
        f"{'step':>5} {'timestep':>9} {'on teacher':>11} {'on its own states':>18} {'ratio':>7}",
    ]
    there, own = (run["states"][whose]["mean"] for whose in WHOSE)
    rows = [
        (str(i + 1), f"{t:9.3f}", a, b) for i, (t, a, b) in enumerate(zip(run["timesteps"], there, own, strict=True))
    ]
    rows.append(("mean", " " * 9, sum(there) / len(there), sum(own) / len(own)))
    return "\n".join([*lines, *(f"{n:>5} {t} {a:11.4f} {b:18.4f} {b / a if a else 1:7.2f}" for n, t, a, b in rows)])
