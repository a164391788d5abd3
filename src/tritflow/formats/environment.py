"""What this machine has: versions, device, memory. The kernels' own account of themselves joins it lazily."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "peft", "numpy")


def usable_cores() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_bytes() -> int | None:
    """The machine's memory; None where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def free_bytes(folder: Path) -> int:
    """What is free on the disk where a folder lies, or will lie."""
    return shutil.disk_usage(next(p for p in (folder, *folder.absolute().parents) if p.is_dir())).free


def environment() -> dict[str, str]:
    """Facts for a bug report, label -> text. Reads versions from metadata; only torch is imported."""
    import torch

    facts = {"python": platform.python_version(), "system": platform.platform(), "machine": platform.machine()}
    for package in ("tritflow", *_PACKAGES):
        try:
            facts[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            facts[package] = "not installed"
    facts["cpu cores"] = str(usable_cores())
    facts["torch threads"] = str(torch.get_num_threads())
    facts["cpu capability"] = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.1f} GiB"
        facts["cuda runtime"] = str(torch.version.cuda or torch.version.hip)
    else:
        facts["cuda"] = "no device"
    facts["mps"] = "available" if torch.backends.mps.is_available() else "no device"
    return facts
