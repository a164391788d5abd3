from __future__ import annotations

from contextlib import contextmanager, nullcontext

import pytest
import torch

from tritflow.kernels.promise import weights_are_constant
from tritflow.models import cuda_graph


@pytest.fixture
def graphs(monkeypatch):
    """Recording without a GPU; says whether the promise was given when a recording began."""
    begun = []

    class Graph:
        def replay(self):
            pass

    @contextmanager
    def recording(graph):
        begun.append(weights_are_constant())
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    return begun


def test_a_step_runs_and_is_recorded_under_the_promise_of_constant_weights(graphs):
    seen = []

    def step(x):
        seen.append(weights_are_constant())
        return x + 1

    call = cuda_graph.GraphedCall(step)
    for _ in range(3):
        assert call(torch.zeros(2)).tolist() == [1, 1]
        assert not weights_are_constant()
    assert seen == [True, True]  # as it is, so that the same kernels are compiled; then recorded, and not run again
    assert graphs == [True]
