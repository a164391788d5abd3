"""The bench of a memory budget as far as a CPU can run it: the sums, the table, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tritflow.pipelines.loading import DeviceError
from tritflow.pipelines.memory_plan import GIB, MemoryPlanError
from tritflow.pipelines.synthetic_pipeline import components
from tritflow.profiling import memory as bench


class _Parts:
    """As much of a pipeline as sizes are read from."""

    def __init__(self):
        from tritflow.pipelines.component_sizes import meta_model

        for name, _, library, cls, config in components():
            setattr(self, name, meta_model(library, cls, config, torch.bfloat16))
        self.components = {name: getattr(self, name) for name, *_ in components()}


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 80 GB on which everything succeeds; returns the list of what was held."""
    held: list[float] = []
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device("cuda:0"))
    monkeypatch.setattr(bench, "random_pipeline", _Parts)
    monkeypatch.setattr(bench, "apply_plan", lambda *_: None)
    monkeypatch.setattr(bench, "generate", lambda *_, **__: [Image.new("RGB", (8, 8))])
    monkeypatch.setattr(bench.results, "provenance", lambda device: {"device": "a GPU"})
    cuda = {
        "mem_get_info": lambda _: (74 * GIB, 80 * GIB),
        "reset_peak_memory_stats": lambda _: None,
        "max_memory_reserved": lambda _: 5 * GIB,
        "memory_reserved": lambda _: 5 * GIB,
        "set_per_process_memory_fraction": lambda share, number: held.append(share) if number == 0 else 1 / 0,
        "current_device": lambda: 0,
    }
    for name, fake in cuda.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return held


def test_what_lies_outside_of_the_allocator_counts(gpu):
    run = bench.measure("6.5GiB", pictures=2)
    assert run["outside_bytes"] == GIB
    assert run["used_bytes"] == 6 * GIB
    assert run["kept"]
    assert len(run["seconds"]) == 2
    assert run["plan"]["components"]["transformer"]["placement"] == "on the GPU while it runs"
    assert gpu[0] < 0.1
    assert gpu[-1] == 1.0
    assert "used 6.00 GiB (5.00 GiB by PyTorch, 1.00 GiB outside), within the budget" in bench.table(run)
    assert "MORE THAN THE BUDGET" in bench.table(bench.measure("5.9GiB"))


def test_what_cannot_be_kept_is_refused(gpu, monkeypatch):
    with pytest.raises(MemoryPlanError):
        bench.measure("1GiB")
    assert gpu == [1.0]
    monkeypatch.setattr(bench, "pick_device", lambda _: torch.device("cpu"))
    with pytest.raises(DeviceError, match="needs a CUDA device"):
        bench.measure("6GiB")


def test_a_plan_that_does_not_hold_is_a_result(gpu, monkeypatch):
    drawn = []

    def generate(*_, **__):
        if drawn:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")
        drawn.append(1)
        return [Image.new("RGB", (8, 8))]

    monkeypatch.setattr(bench, "generate", generate)
    run = bench.measure("6.5GiB", pictures=2)
    assert not run["kept"]
    assert run["error"] == "picture 2 did not fit: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert len(run["seconds"]) == 1
    assert "picture 2 did not fit" in bench.table(run)
    assert gpu[-1] == 1.0
