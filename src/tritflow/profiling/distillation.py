"""What a step of end-to-end distillation costs at a model's real size: seconds, and the most memory it takes.

The student has the model's shapes and random trits; a step runs forward, backward and both optimisers as `quantize`
does, on random inputs and targets. What is not in it: the teacher, whose velocities a recipe without a pool reads from
disk, and reading them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor

from tritflow import results
from tritflow.config import DistillationConfig
from tritflow.distillation.compilation import compile_blocks_
from tritflow.distillation.offload import OffloadedLatents
from tritflow.distillation.parameters import latent_dtype, parameter_groups
from tritflow.distillation.state import TrainingState
from tritflow.distillation.step import Step, training_attention
from tritflow.formats.architecture import FLUX1_DEV
from tritflow.models import FLUX1
from tritflow.models.flux1_training import training_forward
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.pipelines.loading import DeviceError
from tritflow.pipelines.offloading import limit_memory
from tritflow.pipelines.synthetic import random_student
from tritflow.profiling.contenders import step_inputs
from tritflow.profiling.memory import gpu_bytes
from tritflow.profiling.storage import peak_memory

Progress = Callable[[int, int], None]


def measure_steps(
    config: Mapping[str, Any] = FLUX1_DEV,
    settings: DistillationConfig | None = None,
    *,
    model: str = "FLUX.1-dev",
    device: str = "cuda",
    pixels: int = 1024,
    text_tokens: int = 512,
    batches: Sequence[int] = (1, 8),
    steps: int = 3,
    latent_store: Literal["device", "ram"] = "device",
    budget: int | None = None,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Time optimiser steps of a whole random student; a run a batch size, for `results.append`.

    Args:
        config: a `FluxTransformer2DModel` config.
        settings: optimiser, `lean`, `compile_blocks` (None: Muon, lean).
        model: its name in tables.
        device: where to train.
        pixels: height and width of the pictures (16 pixels a token).
        text_tokens: of each prompt.
        batches: pairs a step, one measurement each.
        steps: that are timed, after one that is not.
        latent_store: where latent weights and momenta are kept, as in a recipe's `[streaming]`.
        budget: bytes of GPU memory, CUDA's own included, to which PyTorch is held: what a smaller card would do.
        progress: called as (measurements done, of how many).

    Returns:
        For each batch size: `seconds` (median of the steps) and `peak_bytes` of the GPU (of the process on a CPU), or
        `fits`: false where memory ran out; `used_bytes`, what the allocator reserved and the driver counts outside of
        it (None on a CPU); `latent_bytes` of latent weights and `moment_bytes` of what their optimiser remembers.

    Raises:
        DeviceError: a budget without a CUDA device.
    """
    on = torch.device(device)
    if budget is not None and on.type != "cuda":
        raise DeviceError(f"a budget of GPU memory needs a CUDA device, and this is {on.type}")
    settings = settings or DistillationConfig(optimizer="muon", lean=True)
    student = random_student(
        config,
        device,
        latent_dtype=latent_dtype(settings),
        latent_device="cpu" if latent_store == "ram" else None,
        activation_bits=settings.activation_bits,
    )
    if settings.lean:
        student.enable_gradient_checkpointing()
    with ExitStack() as open_:
        if budget is not None:
            torch.cuda.empty_cache()
            limit_memory(budget, on)
            open_.callback(limit_memory, None, on)
        offload = None
        if latent_store == "ram":
            offload = open_.enter_context(OffloadedLatents(student, FLUX1.block_order(config), on))
        state = TrainingState(parameter_groups(student, settings), settings, on, offload=offload)
        common = _common(student, state, settings, device) | {
            "model": model,
            "latent_store": latent_store,
            "pixels": pixels,
            "text_tokens": text_tokens,
            "budget_bytes": budget,
        }
        open_.enter_context(training_attention(on))
        open_.enter_context(training_forward(student))
        if common["settings"]["compile_blocks"]:
            compile_blocks_(student)
        runs: list[dict[str, Any]] = []
        for batch in batches:
            inputs = _inputs(config, on, batch, pixels, text_tokens)
            try:
                found: dict[str, Any] = {"fits": True, **_timed(student, state, inputs, settings, steps)}
            except torch.OutOfMemoryError:
                found = {"fits": False, "seconds": None, "peak_bytes": None, "used_bytes": None}
                state.zero_grad()
                if offload is not None:
                    offload.settle()
                torch.cuda.empty_cache()
            runs.append({**common, "batch_size": batch, **found})
            if progress is not None:
                progress(len(runs), len(batches))
    return runs


def _common(student: Any, state: TrainingState, settings: DistillationConfig, device: str) -> dict[str, Any]:
    latents = [m.weight for m in student.modules() if isinstance(m, FakeTernaryLinear)]
    return {
        **results.provenance(device),
        "random": True,
        "weights": sum(p.numel() for p in latents),
        "latent_bytes": sum(p.nbytes for p in latents),
        "moment_bytes": sum(t.nbytes for t in state.tensors()[len(state.parameters) :]),
        "settings": {
            "optimizer": settings.optimizer,
            "lean": settings.lean,
            "compile_blocks": settings.compile_blocks and state.device.type == "cuda",  # as distillation does
        },
        "peak_of": "GPU" if state.device.type == "cuda" else "process",
    }


def _inputs(config: Mapping[str, Any], device: torch.device, batch: int, pixels: int, text: int) -> dict[str, Any]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    inputs = step_inputs(config, pixels, batch, str(device), dtype, text)
    inputs["timestep"] = torch.linspace(0.1, 0.9, batch, device=device).to(dtype)
    if not config.get("guidance_embeds"):
        del inputs["guidance"]
    return inputs


def _timed(
    student: Any, state: TrainingState, inputs: dict[str, Any], settings: DistillationConfig, steps: int
) -> dict[str, Any]:
    device = state.device
    target = torch.zeros_like(inputs["hidden_states"], dtype=torch.float32)

    def loss(kwargs: Mapping[str, Tensor]) -> Tensor:
        return (student(**kwargs)[0].float() - target).square().mean()

    step, seconds = Step(loss, state, settings.grad_clip), []
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with peak_memory() as resident:
        for number in range(steps + 1):
            state.set_learning_rates(number)
            begin = _now(device)
            step.eager(inputs)
            seconds.append(_now(device) - begin)
    return {
        "seconds": float(f"{statistics.median(seconds[1:]):.4g}"),
        "peak_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else resident(),
        "used_bytes": sum(gpu_bytes(device)) if on_gpu else None,
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
