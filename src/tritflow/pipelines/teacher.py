"""Record the teacher at work: for every sampler step the transformer's exact inputs and the velocity it gave.

The steps are those of the stock `FluxPipeline` with its own scheduler, but many trajectories run side by side and
each may have its own guidance and its own shifted sigmas, which one pipeline call cannot do. Without jitter and
with one guidance, the last latents equal the pipeline's (tests hold that). Prompts and noise are all it takes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tritflow.calibration.artifacts import provenance
from tritflow.calibration.prompts import Prompt, PromptSet, from_texts
from tritflow.calibration.trajectories import VELOCITY, Trajectories, TrajectoryWriter, seed_of
from tritflow.config import CalibrationConfig
from tritflow.distillation.sharded import Ranks
from tritflow.pipelines.loading import GenerationDefaults, generation_defaults

Driver = Callable[..., Tensor]


class TeacherError(ValueError):
    """This pipeline cannot be recorded, or gave something that is no number."""


@dataclass(frozen=True)
class _Plan:
    """One trajectory: what was drawn for it."""

    index: int
    text: str
    guidance: float
    shift: float


def record_trajectories(
    pipe: Any,
    prompts: PromptSet | Sequence[str],
    out_dir: Path | str,
    config: CalibrationConfig,
    *,
    defaults: GenerationDefaults | None = None,
    store_dtype: torch.dtype | None = None,
    parents: dict[str, str] | None = None,
    driver: Driver | None = None,
    ranks: Ranks | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Trajectories:
    """Run the teacher over prompts and keep (kwargs, velocity) of every step; resumes shard by shard.

    Several processes, each with a pipeline of its own, share the shards; the bytes are those of one. With a `driver`,
    the states are those that the driver comes to by itself, and the velocities the teacher's there.

    Args:
        pipe: a `FluxPipeline` with a flow-match Euler scheduler, on its device.
        prompts: one trajectory each; `config.num_prompts` of them (0: all).
        out_dir: the trajectory folder; one with the same settings is continued.
        config: sizes, steps, guidance values, jitter, seed, batch size (which is also the shard size).
        defaults: height, width and text tokens where `config` says 0 (None: the model folder's own).
        store_dtype: of stored latents, text and velocity. None: the pipeline's dtype, and half precision for an
            fp32 pipeline. The teacher then sees the rounded values, so every stored pair stays exact.
        parents: hashes of what this depends on, for meta.json (None: a fingerprint of the transformer).
        driver: called with the transformer's keyword arguments, gives the velocity that the sampler follows (None: the
            teacher's own).
        ranks: the processes that record together; all call this (None: this one alone).
        on_progress: called as (trajectories done, of how many) after each shard of this process, as if the others had
            come as far.

    Returns:
        The finished `Trajectories`.

    Raises:
        TeacherError: another scheduler, or a velocity that is not finite.
        TrajectoryError: the folder belongs to other settings.
        DiskFullError: no space left; the same call resumes.
    """
    _check_scheduler(pipe.scheduler)
    chosen = prompts if isinstance(prompts, PromptSet) else from_texts(prompts)
    chosen = chosen.trajectories(config.num_prompts, config.seed)
    defaults = generation_defaults(pipe) if defaults is None else defaults
    transformer = pipe.transformer
    dtype = next(transformer.parameters()).dtype
    if store_dtype is None:
        store_dtype = torch.float16 if dtype == torch.float32 else dtype
    sizes = sizes_of(config, defaults)
    device = pipe._execution_device
    identity = {
        "config": config.to_dict(),
        "config_hash": config.hash,
        "seed": config.seed,
        "prompts": chosen.describe(),
        "parents": parents or {"transformer": fingerprint(transformer)},
        "dtype": [str(dtype), str(store_dtype)],
        **sizes,
    }
    ranks = ranks or Ranks()
    if not ranks.first:
        ranks.wait()  # for the first one's meta.json
    writer = TrajectoryWriter(out_dir, identity, provenance(device))
    if ranks.first:
        ranks.wait()
    plans = [_plan(i, p, config) for i, p in enumerate(chosen)]
    shards = [plans[i : i + config.batch_size] for i in range(0, len(plans), config.batch_size)]
    if writer.complete:
        return Trajectories(out_dir)
    recorder = _Recorder(pipe, config, sizes, dtype, store_dtype, device, driver)
    done = 0
    with ThreadPoolExecutor(1) as pool:
        # One shard is written while the next is recorded; not more, or memory would hold them all.
        writing: Future[None] | None = None
        for number, batch in list(enumerate(shards))[ranks.rank :: ranks.world]:
            tensors = None if writer.has(number) else recorder.run(batch)
            if writing is not None:
                writing.result()
            writing = None if tensors is None else pool.submit(writer.write, number, *tensors)
            done += ranks.world * len(batch)
            if on_progress is not None:
                on_progress(min(done, len(plans)), len(plans))
        if writing is not None:
            writing.result()
    digests = {number: digest for found in ranks.every(writer.digests) for number, digest in found.items()}
    if ranks.first:
        writer.finish(len(shards), recorder.shared(), recorder.dtypes(), digests)
    ranks.wait()
    pipe.maybe_free_model_hooks()
    return Trajectories(out_dir)


def sizes_of(config: CalibrationConfig, defaults: GenerationDefaults) -> dict[str, int]:
    """Height and width in pixels and text tokens: the config's, and where it says 0 the model folder's."""
    return {
        "height": config.height or defaults.height,
        "width": config.width or defaults.width,
        "max_sequence_length": config.max_sequence_length or defaults.max_sequence_length,
    }


def token_grid(pipe: Any, sizes: dict[str, int]) -> tuple[int, int]:
    """Rows and columns of image tokens. Raises `TeacherError` where there is none."""
    factor = pipe.vae_scale_factor * 2
    rows, columns = sizes["height"] // factor, sizes["width"] // factor
    if not rows or not columns:
        raise TeacherError(f"{sizes['height']}x{sizes['width']} pixels are too few: one token takes {factor}")
    return rows, columns


def position_ids(pipe: Any, sizes: dict[str, int], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rotary positions of text and image, the same for all states."""
    text = torch.zeros(sizes["max_sequence_length"], 3, device=device, dtype=dtype)
    return {
        "txt_ids": text,
        "img_ids": pipe._prepare_latent_image_ids(1, *token_grid(pipe, sizes), device, dtype),
    }


def fingerprint(module: torch.nn.Module) -> str:
    """16 hex digits over every tensor's name, dtype, shape and first 4 KiB: tells models apart in no time."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        head = tensor.detach().reshape(-1)[: 4096 // tensor.element_size()].cpu().contiguous()
        digest.update(head.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class _Recorder:
    """Runs batches of trajectories through one pipeline."""

    def __init__(
        self,
        pipe: Any,
        config: CalibrationConfig,
        sizes: dict[str, int],
        dtype: torch.dtype,
        store_dtype: torch.dtype,
        device: torch.device,
        driver: Driver | None = None,
    ) -> None:
        self.pipe, self.config, self.sizes, self.driver = pipe, config, sizes, driver
        self.dtype, self.store_dtype, self.device = dtype, store_dtype, device
        self.guided = bool(pipe.transformer.config.guidance_embeds)
        self.rows, self.columns = token_grid(pipe, sizes)
        self.channels = pipe.transformer.config.in_channels // 4
        self.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)

    @torch.no_grad()
    def run(self, plans: Sequence[_Plan]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Per-step [T, S, ...] and per-trajectory [T, ...] tensors of one batch, on the CPU."""
        pipe, device = self.pipe, self.device
        embeds, pooled, _ = pipe.encode_prompt(
            prompt=[p.text for p in plans],
            prompt_2=None,
            device=device,
            max_sequence_length=self.sizes["max_sequence_length"],
        )
        trajectory = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
        stored = {name: self._compact(t, name) for name, t in trajectory.items()}
        kwargs: dict[str, Any] = {name: t.to(self.dtype) for name, t in stored.items()}
        kwargs |= {name: t.to(device) for name, t in self.shared().items()}
        kwargs["guidance"] = None
        if self.guided:
            kwargs["guidance"] = torch.tensor([p.guidance for p in plans], dtype=torch.float32, device=device)
            stored["guidance"] = kwargs["guidance"]
        sigmas = self._sigmas(plans).to(device)  # [T, S + 1]
        latents = self._noise(plans)
        steps: dict[str, list[Tensor]] = {"hidden_states": [], "timestep": [], VELOCITY: []}
        for i in range(sigmas.shape[1] - 1):
            compact = self._compact(latents, "hidden_states")
            timestep = (sigmas[:, i] * self.scheduler.config.num_train_timesteps).to(self.dtype) / 1000
            velocity = pipe.transformer(
                hidden_states=compact.to(self.dtype), timestep=timestep, return_dict=False, **kwargs
            )[0]
            steps["hidden_states"].append(compact)
            steps["timestep"].append(timestep)
            steps[VELOCITY].append(self._compact(velocity, "the teacher's velocity"))
            if self.driver is not None:
                velocity = self.driver(hidden_states=compact.to(self.dtype), timestep=timestep, **kwargs).to(self.dtype)
            # As in the scheduler: step width and product are rounded to the model's dtype, the sum is fp32.
            width = (sigmas[:, i + 1] - sigmas[:, i]).to(velocity.dtype)[:, None, None]
            latents = (latents.float() + (width * velocity).float()).to(velocity.dtype)
        self.last = latents
        return (
            {name: torch.stack(list_, dim=1).cpu() for name, list_ in steps.items()},
            {name: t.cpu() for name, t in stored.items()},
        )

    def shared(self) -> dict[str, Tensor]:
        """Rotary positions, the same for all; on the CPU."""
        return position_ids(self.pipe, self.sizes, torch.device("cpu"), self.dtype)

    def dtypes(self) -> dict[str, torch.dtype]:
        """The transformer's own dtypes of what was stored more compactly."""
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections")
        return dict.fromkeys(names, self.dtype) if self.dtype != self.store_dtype else {}

    def _compact(self, tensor: Tensor, name: str) -> Tensor:
        compact = tensor.to(self.store_dtype)
        if not bool(torch.isfinite(compact).all()):
            raise TeacherError(
                f"{name} is not finite in {str(self.store_dtype).removeprefix('torch.')}: "
                "record with a wider dtype, or check the teacher"
            )
        return compact

    def _noise(self, plans: Sequence[_Plan]) -> Tensor:
        """Packed latents [T, tokens, channels]; drawn on the CPU, each trajectory from its own seed."""
        shape = (1, self.channels, 2 * self.rows, 2 * self.columns)
        drawn = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(self.config.seed, p.index)))
            for p in plans
        ]
        noise = torch.cat(drawn).to(self.device, self.dtype)
        packed: Tensor = self.pipe._pack_latents(noise, len(plans), *shape[1:])
        return packed

    def _sigmas(self, plans: Sequence[_Plan]) -> Tensor:
        """[T, S + 1] through the scheduler's own shift, each trajectory moved by its share of a step."""
        count = self.config.num_inference_steps
        return jittered_sigmas(self.scheduler, self.rows * self.columns, count, [p.shift for p in plans])


def jittered_sigmas(scheduler: Any, tokens: int, count: int, shifts: Sequence[float]) -> Tensor:
    """Noise levels [len(shifts), count + 1] as `FluxPipeline` sets them for so many image tokens, each row moved by its
    share of a step; all start from pure noise."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    mu = calculate_shift(
        tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    even = np.linspace(1.0, 1 / count, count)
    rows = []
    for shift in shifts:
        moved = even + shift / count
        moved[0] = 1.0
        scheduler.set_timesteps(sigmas=moved.tolist(), mu=mu)
        rows.append(scheduler.sigmas.clone())
    return torch.stack(rows)


def _plan(index: int, prompt: Prompt, config: CalibrationConfig) -> _Plan:
    """Guidance and jitter by hash of seed and index, so that neither depends on the batch size."""
    draw = hashlib.sha256(f"{config.seed}/{index}".encode()).digest()
    guidance = config.guidance_scales[int.from_bytes(draw[:8]) % len(config.guidance_scales)]
    shift = config.timestep_jitter * (int.from_bytes(draw[8:16]) / 2**64 - 0.5)
    return _Plan(index, prompt.text, guidance, shift)


def _check_scheduler(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if name != "FlowMatchEulerDiscreteScheduler" or scheduler.config.get("stochastic_sampling", False):
        raise TeacherError(
            f"trajectories are recorded with FlowMatchEulerDiscreteScheduler without stochastic sampling, not {name}"
        )
