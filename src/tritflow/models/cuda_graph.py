"""A function of tensors, recorded once per set of shapes as a CUDA graph and replayed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_KEPT = 4  # graphs at a time; each holds its activations' memory


@dataclass
class _Recording:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class GraphedCall:
    """`function(*tensors)`, where `function` always launches the same kernels for the same shapes.

    The first call of a set of shapes runs the function as it is (kernels get compiled then), the second records it,
    later ones replay. Results are the function's own bits.

    Args:
        function: of CUDA tensors on one device, returning one tensor; it must not synchronise.
    """

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self.function = function
        self._seen: set[tuple[object, ...]] = set()
        self._recordings: dict[tuple[object, ...], _Recording] = {}

    def forget(self) -> None:
        """Drop every recording and its memory."""
        self._seen.clear()
        self._recordings.clear()

    def __call__(self, *tensors: Tensor) -> Tensor:
        """`function(*tensors)`; the result is the caller's to keep."""
        key = tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)
        if key not in self._seen:
            self._seen.add(key)
            return self.function(*tensors)
        recording = self._recordings.get(key)
        if recording is None:
            recording = self._record(tensors)
            while len(self._recordings) >= _KEPT:
                self._recordings.pop(next(iter(self._recordings)))
            self._recordings[key] = recording
        for static, given in zip(recording.inputs, tensors, strict=True):
            static.copy_(given)
        recording.graph.replay()
        return recording.output.clone()

    def _record(self, tensors: tuple[Tensor, ...]) -> _Recording:
        inputs = [t.detach().clone(memory_format=torch.contiguous_format) for t in tensors]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(tensors[0].device), torch.cuda.graph(graph):
            output = self.function(*inputs)
        return _Recording(graph, inputs, output)
