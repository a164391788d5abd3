"""Two pieces of work, side by side only where a CUDA graph is recorded (tests/gpu has that)."""

from __future__ import annotations

import torch

from tritflow.models.beside import beside


def test_both_results_come_back_in_their_places():
    order: list[str] = []

    def work(name: str, value: int) -> torch.Tensor:
        order.append(name)
        return torch.full((2,), value)

    small, large = beside(lambda: work("small", 1), lambda: work("large", 2))
    assert small.tolist() == [1, 1]
    assert large.tolist() == [2, 2]
    assert order == ["small", "large"]


def test_it_is_traced_without_a_break():
    def both(x: torch.Tensor) -> torch.Tensor:
        small, large = beside(lambda: x + 1, lambda: x * 2)
        return small - large

    x = torch.randn(4)
    assert torch.equal(torch.compile(both, fullgraph=True, backend="eager")(x), both(x))
