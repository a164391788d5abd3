"""One optimiser step: forward, backward, clipping, update; eager, or on CUDA as one graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritflow.distillation.sharded import Ranks
from tritflow.distillation.state import TrainingState


def autocast(device: torch.device) -> AbstractContextManager[Any]:
    """bf16 on CUDA; nothing elsewhere."""
    # No cache of cast weights: a captured step must cast anew each time it is replayed.
    return torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if device.type == "cuda" else nullcontext()


@contextmanager
def training_attention(device: torch.device) -> Iterator[None]:
    """Without cuDNN's attention, whose backward reads out of bounds (torch 2.11, H100 and H200)."""
    if device.type != "cuda" or not torch.backends.cuda.cudnn_sdp_enabled():
        yield
        return
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def beside(device: torch.device, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Begin `work` beside what follows, and return what waits for its result: a branch of the CUDA graph that is being
    recorded. Elsewhere it is done at once. Tensors that it reads must be kept until it has been waited for.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        result = work()
        return lambda: result
    here, other = torch.cuda.current_stream(), torch.cuda.Stream()
    other.wait_stream(here)
    with torch.cuda.stream(other):
        result = work()

    def waited() -> Tensor:
        here.wait_stream(other)
        return result

    return waited


class Step:
    """What is repeated in training.

    Args:
        loss: a scalar from named inputs; runs under `autocast`. It must not synchronise with the host to be captured.
        state: what is trained.
        grad_clip: global norm of what AdamW takes (0: none); Muon's steps have one size anyway.
    """

    def __init__(self, loss: Callable[[Mapping[str, Tensor]], Tensor], state: TrainingState, grad_clip: float) -> None:
        self.loss, self.state, self.grad_clip = loss, state, grad_clip

    def eager(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """One step; returns the loss as a scalar on the device, without waiting for it."""
        loss, gradients = self._backward(inputs)
        self._exchange(gradients)
        self._update(gradients)
        return loss

    def _backward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The loss, and all gradients in one piece where they have to be exchanged."""
        self.state.zero_grad()
        with autocast(self.state.device):
            loss = self.loss(inputs)
        loss.backward()
        if not self.state.replicated:
            return loss.detach(), None
        return loss.detach(), torch.cat([p.grad.flatten() for p in self.state.parameters if p.grad is not None])

    def _exchange(self, gradients: Tensor | None) -> None:
        if gradients is not None:
            dist.all_reduce(gradients)

    def _update(self, gradients: Tensor | None) -> None:
        if gradients is not None:
            gradients = gradients / Ranks.here().world
            own = [p.grad for p in self.state.parameters if p.grad is not None]
            for grad, part in zip(own, gradients.split([g.numel() for g in own]), strict=True):
                grad.copy_(part.view_as(grad))
        if self.grad_clip > 0 and self.state.clipped:
            nn.utils.clip_grad_norm_(self.state.clipped, self.grad_clip)
        self.state.step()

    def capture(self, sample: Mapping[str, Tensor]) -> Callable[[Mapping[str, Tensor]], Tensor]:
        """The same step as a CUDA graph over static inputs; parameters and optimiser state are left as they were."""
        static = {name: tensor.clone() for name, tensor in sample.items()}
        before = [t.clone() for t in self.state.tensors()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # allocators, cuBLAS handles and autotuning settle outside the graph
                self.eager(static)
        torch.cuda.current_stream().wait_stream(stream)
        graph, rest = torch.cuda.CUDAGraph(), None
        gradients: Tensor | None = None
        self.state.zero_grad()
        if self.state.replicated:
            # Two graphs, and the exchange between them: a collective inside of one ties it to the communicator.
            rest = torch.cuda.CUDAGraph()
            # NCCL's own thread asks the device meanwhile, which would break a capture that watches all threads.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss, gradients = self._backward(static)
            with torch.cuda.graph(rest, pool=graph.pool(), capture_error_mode="thread_local"):
                self._update(gradients)
        else:
            with torch.cuda.graph(graph):
                loss = self.eager(static)
        with torch.no_grad():
            for tensor, value in zip(self.state.tensors(), before, strict=True):
                tensor.copy_(value)

        def replay(inputs: Mapping[str, Tensor]) -> Tensor:
            for name, tensor in inputs.items():
                static[name].copy_(tensor)
            graph.replay()
            if rest is not None:
                self._exchange(gradients)
                rest.replay()
            return loss

        return replay
