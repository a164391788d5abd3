"""A whole pipeline, text to picture, held to a budget of GPU memory: what it takes by the driver's own count.

`pipelines.memory_plan` says what lies where, PyTorch's allocator is held to the budget, pictures are drawn. What CUDA's
context and loaded kernels take outside of the allocator is read from the driver and counted too.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from tritflow import results
from tritflow.pipelines.component_sizes import sizes_of
from tritflow.pipelines.generate import generate, save_pictures
from tritflow.pipelines.loading import DeviceError, configure_, load_pipeline, pick_device, quiet
from tritflow.pipelines.memory_plan import Workload, choose_plan, gib, parse_bytes
from tritflow.pipelines.offloading import apply_plan, keep_plan, limit_memory, plan_memory
from tritflow.pipelines.synthetic_pipeline import RANDOM, random_pipeline
from tritflow.profiling.latency import PROMPT


def measure(
    budget: str | int,
    *,
    model: str | Path | None = None,
    base: str | Path | None = None,
    device: str | None = None,
    mode: str | None = None,
    size: int = 1024,
    num_inference_steps: int = 4,
    pictures: int = 2,
    note: str = "",
) -> dict[str, Any]:
    """Plan, place and draw within a budget.

    Args:
        budget: of GPU memory, all included: bytes, or a text such as "5.3GiB".
        model: as in `load_pipeline`; None for FLUX.1-dev's configs with random weights.
        base, device, mode: as in `load_pipeline`.
        size: of the pictures, in pixels.
        num_inference_steps: of the sampler; memory does not depend on it.
        pictures: drawn one after the other; the first one compiles.
        note: kept in the results.

    Returns:
        A run for `tritflow.results`, topic `memory`: `budget_bytes`, `plan`, `used_bytes` (the most that the allocator
        reserved, plus what the driver counts outside of it), both summands, `kept` (whether that is within the
        budget, and every picture was drawn), `error` (None, or why a picture was not), and `seconds` of each picture.

    Raises:
        MemoryPlanError, MemorySizeError: nothing fits, or no size.
        DeviceError: not a CUDA device.
        ModelError: the model is not there.
    """
    on = pick_device(device)
    if on.type != "cuda":
        raise DeviceError(f"a budget of GPU memory needs a CUDA device, and this is {on.type}")
    limit = parse_bytes(budget) if isinstance(budget, str) else budget
    try:
        with quiet():
            if model is None:
                pipe = random_pipeline()
                if mode is not None:
                    configure_(pipe, mode=mode)
                plan = choose_plan(sizes_of(pipe), Workload(size, size), limit)
                keep_plan(plan, on)
                apply_plan(pipe, plan, on)
            else:
                plan = plan_memory(model, limit, height=size, width=size, base=base, device=on)
                pipe = load_pipeline(model, base=base, device=on, mode=mode, plan=plan)
        torch.cuda.reset_peak_memory_stats(on)
        seconds: list[float] = []
        failed = None
        with tempfile.TemporaryDirectory(prefix="tritflow-memory-") as folder:
            try:
                for seed in range(pictures):
                    begin = time.perf_counter()
                    drawn = generate(
                        pipe, PROMPT, seed, height=size, width=size, num_inference_steps=num_inference_steps
                    )
                    save_pictures(drawn, Path(folder) / "picture.png")
                    seconds.append(round(time.perf_counter() - begin, 3))
            except torch.OutOfMemoryError as error:
                failed = f"picture {len(seconds) + 1} did not fit: {str(error).splitlines()[0][:200]}"
        reserved, outside = gpu_bytes(on)
    finally:
        limit_memory(None, on)
    return {
        **results.provenance(str(on)),
        "model": RANDOM if model is None else Path(model).name,
        "mode": mode,
        "budget_bytes": limit,
        "plan": plan.to_dict(),
        "used_bytes": reserved + outside,
        "reserved_bytes": reserved,
        "outside_bytes": outside,
        "kept": failed is None and reserved + outside <= limit,
        "error": failed,
        "seconds": seconds,
        "last_seconds": seconds[-1] if seconds else None,
        "settings": {"size": size, "num_inference_steps": num_inference_steps, "pictures": pictures},
        "note": note,
    }


def gpu_bytes(device: torch.device) -> tuple[int, int]:
    """The most that PyTorch's allocator reserved since its peak was reset, and what the driver counts outside of it."""
    free, total = torch.cuda.mem_get_info(device)
    return torch.cuda.max_memory_reserved(device), total - free - torch.cuda.memory_reserved(device)


def table(run: dict[str, Any]) -> str:
    """The run in plain text."""
    parts = run["plan"]["components"]
    lines = [f"{run['model']} on {run['device']}, within {gib(run['budget_bytes'])}:"]
    lines += [f"  {name:16} {gib(part['bytes']):>10}  {part['placement']}" for name, part in parts.items()]
    inside, outside = gib(run["reserved_bytes"]), gib(run["outside_bytes"])
    last = f"last picture {run['last_seconds']:.1f} s" if run["seconds"] else "no picture"
    end = f"{run['error'] or ('within the budget' if run['kept'] else 'MORE THAN THE BUDGET')}; {last}"
    lines.append(f"used {gib(run['used_bytes'])} ({inside} by PyTorch, {outside} outside), {end}")
    return "\n".join(lines)
