"""Times of whole steps on a GPU by CUDA events, and of the kernels within one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch


def timed(run: Callable[[], Any], count: int, warm: int) -> list[float]:
    """Milliseconds of each of `count` calls by CUDA events, after `warm` calls that do not count."""
    for _ in range(warm):
        run()
    torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def kernel_times(step: Callable[[], Any], most: int = 40) -> dict[str, Any]:
    """Where a step's time goes.

    Returns:
        `kernels`, those with the largest totals in milliseconds; `kernel_milliseconds` and `kernel_calls` of all of
        them. Empty where tracing fails. Kernels that run side by side count twice in the sum.
    """
    from torch.profiler import ProfilerActivity, profile

    try:
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            step()
            torch.cuda.synchronize()
        found = [
            {"name": e.key[:100], "calls": e.count, "milliseconds": round(e.self_device_time_total / 1e3, 4)}
            for e in trace.key_averages()
            if e.self_device_time_total > 0
        ]
    except (RuntimeError, AssertionError, AttributeError):  # no tracing on this machine: the times stand without it
        return {}
    return {
        "kernels": sorted(found, key=lambda kernel: -kernel["milliseconds"])[:most],
        "kernel_milliseconds": round(sum(kernel["milliseconds"] for kernel in found), 4),
        "kernel_calls": sum(kernel["calls"] for kernel in found),
    }
