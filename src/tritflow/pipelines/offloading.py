"""Put a pipeline's components where a memory plan wants them, with diffusers' and accelerate's own hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from tritflow.pipelines.component_sizes import read_sizes
from tritflow.pipelines.defaults import GenerationDefaults, stored_defaults
from tritflow.pipelines.loading import DeviceError, locate_model, pick_device, pick_dtype
from tritflow.pipelines.memory_plan import (
    CONTEXT,
    MemoryPlan,
    MemoryPlanError,
    Placement,
    Workload,
    choose_plan,
    gib,
    parse_bytes,
)


def plan_memory(
    model: str | Path,
    max_memory: str | int,
    *,
    height: int | None = None,
    width: int | None = None,
    batch: int = 1,
    max_sequence_length: int | None = None,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> MemoryPlan:
    """How `model` can draw within `max_memory` bytes of a CUDA device; nothing is loaded but configs.

    Args:
        model: see `loading.resolve_model`.
        max_memory: of the GPU, all included: bytes, or a text such as "6GiB".
        height, width, max_sequence_length: as in `generate`; default: the model's own.
        batch: pictures at once.
        base, device, dtype: as in `load_pipeline`, which takes the plan.

    Raises:
        MemorySizeError, MemoryPlanError: no size, or nothing fits; says what would.
        DeviceError: not a CUDA device.
        ModelError, AssetError: as in `load_pipeline`.
    """
    budget = parse_bytes(max_memory) if isinstance(max_memory, str) else max_memory
    on = pick_device(device)
    if on.type != "cuda":
        raise DeviceError(f"--max-memory bounds a CUDA device's memory, and this is {on.type}; leave it out")
    source = locate_model(model, base)
    own = stored_defaults(source.pipeline) or GenerationDefaults()
    as_type = pick_dtype(dtype, on)
    work = Workload(
        height=height or own.height,
        width=width or own.width,
        batch=batch,
        text_tokens=max_sequence_length or own.max_sequence_length,
        itemsize=as_type.itemsize,
    )
    return choose_plan(read_sizes(source, as_type), work, budget)


def keep_plan(plan: MemoryPlan, device: torch.device) -> None:
    """Hold PyTorch's allocator to the plan's budget, less what CUDA takes itself. Call it before loading.

    Raises:
        MemoryPlanError: the device has less memory free than the plan needs.
    """
    free, total = torch.cuda.mem_get_info(device)
    if plan.peak - CONTEXT > free:
        raise MemoryPlanError(
            f"the plan needs {gib(plan.peak)} and {device} has {gib(free)} free of {gib(total)}; close other programs, "
            f"or give --max-memory {free / 2**30:.1f}GiB or less"
        )
    limit_memory(plan.budget, device)


def limit_memory(budget: int | None, device: torch.device) -> None:
    """Hold PyTorch's allocator to so many bytes of a CUDA device, less what CUDA takes itself; None lifts the limit."""
    total = torch.cuda.mem_get_info(device)[1]
    share = 1.0 if budget is None else min(1.0, max(0.0, (budget - CONTEXT) / total))
    # torch.cuda wants a number here, and "cuda" has none.
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(share, number)


def apply_plan(pipe: Any, plan: MemoryPlan, device: torch.device) -> None:
    """Place a pipeline that was loaded on the CPU; it then runs on `device` within the plan.

    Offloaded components take turns: each one moves the one before it back, and the first one of the next batch the
    last one of this.
    """
    from accelerate import cpu_offload_with_hook
    from diffusers.hooks import apply_group_offloading

    device = torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device
    hooks: list[Any] = []
    for size in plan.sizes:
        module: nn.Module = getattr(pipe, size.name)
        where = plan.placements[size.name]
        if where is Placement.RESIDENT:
            module.to(device)
        elif where is Placement.OFFLOADED:
            _, hook = cpu_offload_with_hook(module, device, prev_module_hook=hooks[-1] if hooks else None)
            hooks.append(hook)
        elif where is Placement.STREAMED and size.kind == "text":
            # Once a prompt: pinning gigabytes for that would take longer than it saves.
            apply_group_offloading(module, device, offload_type="leaf_level")
        elif where is Placement.STREAMED:
            stream = device.type == "cuda"
            apply_group_offloading(
                module, device, offload_type="block_level", num_blocks_per_group=1, use_stream=stream
            )
    if len(hooks) > 1:
        hooks[0].hook.prev_module_hook = hooks[-1]
    pipe.vae.enable_slicing()
    if plan.tile is not None:
        scale = 2 ** (len(pipe.vae.config.block_out_channels) - 1)
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = plan.tile, plan.tile // scale
