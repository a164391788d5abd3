"""A training step as two CUDA graphs with an all-reduce between them: small models are bound by launches, not math.

The first graph draws the batch, runs forward and backward and leaves all gradients in one flat buffer; one all-reduce
averages it over the GPUs; the second graph clips, steps and moves the average weights. On the CPU the same functions
run eagerly.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tritflow.distillation.muon import Muon


def world_size() -> int:
    """Processes in this run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


class Trainer:
    """Minimise `loss()` over `parameters`.

    Args:
        loss: draws its own batch on the device and returns a scalar.
        parameters: float32, on one device.
        matrices: those of `parameters` that Muon takes; the rest go to AdamW.
        peak: learning rate; `set_rate` scales it.
        weight_decay: decoupled, of what AdamW takes.
        matrix_decay: decoupled, of what Muon takes.
        slower: factor -> those of `parameters` that AdamW steps at that share of the learning rate.
        share: a scalar on the device that `set_rate` keeps at the learning rate's share of its peak, for `loss` to
            read, captured or not.
        ema: decay of the averaged weights.
        graph: capture CUDA graphs (ignored on the CPU).
        synchronize: average gradients over all processes.
    """

    def __init__(
        self,
        loss: Callable[[], Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        matrices: Sequence[nn.Parameter] = (),
        peak: float = 1e-3,
        weight_decay: float = 0.0,
        matrix_decay: float = 0.0,
        slower: Mapping[float, Sequence[nn.Parameter]] | None = None,
        share: Tensor | None = None,
        ema: float = 0.999,
        clip: float = 1.0,
        graph: bool = True,
        synchronize: bool = True,
    ) -> None:
        self.loss_function, self.clip, self.ema = loss, clip, ema
        # Typed as tensors: torch._foreach_* takes no list of parameters.
        self.parameters: list[Tensor] = list(parameters)
        self.peak, self.synchronize = peak, synchronize and world_size() > 1
        device = self.parameters[0].device
        self.device = device
        self.rate = torch.tensor(0.0, device=device)
        self.share = torch.zeros((), device=device) if share is None else share
        self.flat = torch.zeros(sum(p.numel() for p in self.parameters), device=device)
        offset = 0
        for p in self.parameters:
            p.grad = self.flat[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        taken = {id(p) for p in matrices} | {id(p) for group in (slower or {}).values() for p in group}
        rest = [p for p in self.parameters if id(p) not in taken]
        groups = [(1.0, rest), *((factor, list(group)) for factor, group in (slower or {}).items())]
        self.factors = [factor for factor, _ in groups]
        self.adam = torch.optim.AdamW(
            [{"params": group, "lr": torch.tensor(0.0, device=device)} for _, group in groups],
            lr=torch.tensor(0.0, device=device),
            betas=(0.9, 0.99),
            weight_decay=weight_decay,
            capturable=device.type == "cuda",
        )
        self.muon = Muon(matrices, self.rate, weight_decay=matrix_decay) if matrices else None
        self.average = [p.detach().clone() for p in self.parameters]
        self.last = torch.zeros((), device=device)
        self.ema_weight = torch.tensor(1 - ema, device=device)
        self.steps = 0
        self.wants_graph = graph and device.type == "cuda"
        self.graphs: tuple[torch.cuda.CUDAGraph, torch.cuda.CUDAGraph] | None = None

    def set_rate(self, share: float) -> None:
        """Set the learning rate to `share` of its peak."""
        self.rate.fill_(self.peak * share)
        self.share.fill_(share)
        for group, factor in zip(self.adam.param_groups, self.factors, strict=True):
            group["lr"].fill_(self.peak * share * factor)

    def _gradients(self) -> None:
        self.flat.zero_()
        loss = self.loss_function()
        loss.backward()
        self.last.lerp_(loss.detach(), 0.02)

    @torch.no_grad()
    def _update(self) -> None:
        norm = self.flat.norm()
        # A step with a non-finite gradient is dropped instead of poisoning the weights.
        scale = torch.where(norm.isfinite(), (self.clip / (norm + 1e-6)).clamp(max=1.0), torch.zeros_like(norm))
        self.flat.copy_(torch.where(norm.isfinite(), self.flat * scale, torch.zeros_like(self.flat)))
        self.adam.step()
        if self.muon is not None:
            self.muon.step()
        # Not _foreach_lerp_: its weight is read on the host, which a graph cannot capture.
        torch._foreach_mul_(self.average, 1 - self.ema_weight)
        torch._foreach_add_(self.average, list(torch._foreach_mul(self.parameters, self.ema_weight)))

    def _capture(self) -> None:
        rate = float(self.rate) / self.peak
        self.set_rate(0.0)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._gradients()
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        first, second = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(first):
            self._gradients()
        with torch.cuda.graph(second):
            self._update()
        self.graphs = (first, second)
        # The warm-up steps drew different batches on every GPU: forget them, so that all optimisers start equal.
        for state in self.adam.state.values():
            for value in state.values():
                value.zero_()
        for buffer in self.muon.buffers if self.muon is not None else ():
            buffer.zero_()
        torch._foreach_copy_(self.average, [p.detach() for p in self.parameters])
        self.set_rate(rate)

    def step(self) -> None:
        """One optimiser step."""
        if self.wants_graph and self.graphs is None:
            try:
                self._capture()
            except RuntimeError as error:
                # The generator stays in capture mode after a failure, so there is no going on without the graph.
                raise RuntimeError(f"CUDA graph capture failed: {error.__context__ or error}") from error
        if self.graphs is not None:
            self.graphs[0].replay()
        else:
            self._gradients()
        if self.synchronize:
            dist.all_reduce(self.flat, op=dist.ReduceOp.AVG)
        if self.graphs is not None:
            self.graphs[1].replay()
        else:
            self._update()
        self.steps += 1

    def run(
        self,
        seconds: float,
        *,
        warmup: int = 200,
        decay: float = 0.3,
        start: float = 0.0,
        report: Callable[[int, float, float], None] | None = None,
        every: float = 20.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> int:
        """Train for `seconds` of `clock`: linear warm-up, flat, then linear decay to zero over the last `decay` share.

        All processes take the same number of steps: process 0 keeps the time. Returns the steps taken.
        """
        begin = told = clock()
        share, steps = 0.0, 0
        while True:
            if steps % 10 == 0:
                share = self._agree((clock() - begin) / seconds)
            if share >= 1:
                return steps
            late = start + (1 - start) * share
            rate = min(1.0, (steps + 1) / warmup) * min(1.0, (1 - late) / decay if decay else 1.0)
            self.set_rate(max(rate, 0.0))
            self.ema_weight.fill_(max(1 - self.ema, 1 / (10 + steps)) if start == 0 else 1 - self.ema)
            self.step()
            steps += 1
            if report is not None and clock() - told > every:
                told = clock()
                report(steps, float(self.last), rate)

    def _agree(self, share: float) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        if not self.synchronize:
            return share
        value = torch.tensor(share, device=self.device)
        dist.broadcast(value, 0)
        return float(value)

    @torch.no_grad()
    def load_average(self) -> None:
        """Put the averaged weights into the parameters."""
        torch._foreach_copy_(self.parameters, self.average)
