"""Muon inside of the backward pass, in bfloat16: end-to-end distillation of a model that barely fits its GPU.

A matrix steps as soon as its gradient is there, and the gradient is forgotten at once (Lv et al. 2023, "Full parameter
fine-tuning for large language models with limited resources"), so that of 12 G gradients one block's are alive. Latent
weight and momentum are bfloat16, 4 bytes a weight where float32 with gradients takes 12. Steps are smaller than what
bfloat16 resolves, so the new latent weight is rounded up or down by chance, right on average (Gupta et al. 2015, "Deep
learning with limited numerical precision").
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from tritflow.calibration.trajectories import seed_of
from tritflow.distillation.muon import MOMENTUM, direction
from tritflow.distillation.offload import OffloadedLatents
from tritflow.distillation.sharded import Ranks


class LeanMuon:
    """Muon over 2-D parameters, of which each steps in its own gradient hook.

    Args:
        parameters: [N, K] each, bfloat16; they are given hooks.
        lr: a tensor that holds the rate of the step under way.
        seed: of rounding; what is drawn in a step depends on it and the step's number alone.
        weight_decay: decoupled.
        factors: id of a parameter -> [K], by which the columns of its orthogonalised step are multiplied.
        offload: keeps some of the parameters in the machine's memory, and their momentum with them.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        lr: Tensor,
        *,
        seed: int = 0,
        weight_decay: float = 0.0,
        factors: Mapping[int, Tensor] | None = None,
        offload: OffloadedLatents | None = None,
    ) -> None:
        self.offload = offload
        self.parameters = list(parameters)
        if any(p.ndim != 2 or p.dtype != torch.bfloat16 for p in self.parameters):
            raise ValueError("lean Muon takes bfloat16 matrices")
        self.buffers = [self._buffer_of(p) for p in self.parameters]
        self.lr, self.seed, self.weight_decay, self.factors = lr, seed, weight_decay, factors or {}
        self._number = 0
        self._handles = [
            parameter.register_post_accumulate_grad_hook(lambda p, place=place: self._step(p, place))
            for place, parameter in enumerate(self.parameters)
        ]

    def _buffer_of(self, parameter: Tensor) -> Tensor:
        momentum = torch.zeros_like(parameter, requires_grad=False)
        offload = self._offload_of(parameter)
        return momentum if offload is None else offload.keep_momentum(parameter, momentum)

    def _offload_of(self, parameter: Tensor) -> OffloadedLatents | None:
        return self.offload if self.offload is not None and parameter in self.offload else None

    def momenta(self) -> list[tuple[Tensor, Tensor]]:
        """Every parameter with its momentum."""
        return list(zip(self.parameters, self.buffers, strict=True))

    def begin(self, number: int) -> None:
        """Say which step the next backward pass is."""
        self._number = number

    def step(self) -> None:
        """Every matrix has stepped already."""
        if self.offload is not None:
            self.offload.settle()

    def close(self) -> None:
        """Let the parameters' gradients be; what broke off in the middle of a step is put back where it belongs."""
        for handle in self._handles:
            handle.remove()
        if self.offload is not None:
            self.offload.settle()

    @torch.no_grad()
    def _step(self, parameter: Tensor, place: int) -> None:
        assert parameter.grad is not None
        grad, parameter.grad = parameter.grad.float(), None
        ranks = Ranks.here()
        if ranks.world > 1:
            dist.all_reduce(grad)
            grad /= ranks.world
        offload = self._offload_of(parameter)
        momentum = self.buffers[place] if offload is None else offload.momentum(parameter)
        mean = torch.lerp(momentum.float(), grad, 1 - MOMENTUM)
        update = direction(grad[None], mean[None], self.factors.get(id(parameter)))[0]
        latent = parameter.float()
        if self.weight_decay:
            update += self.weight_decay * latent
        generator = torch.Generator(parameter.device).manual_seed(seed_of(self.seed, 3, self._number, place))
        put_stochastic_(parameter, latent - self.lr * update, generator)
        if offload is None:
            momentum.copy_(mean)
        else:
            offload.stepped(parameter, mean.bfloat16())


@torch.no_grad()
def put_stochastic_(into: Tensor, value: Tensor, generator: torch.Generator) -> None:
    """Write float32 values into a bfloat16 tensor, each rounded to one of its two neighbours, right on average.

    Args:
        into: bfloat16.
        value: float32 of the same shape, finite.
        generator: on the tensors' device.
    """
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator)
    into.copy_(((bits + noise) & -(1 << 16)).view(torch.float32))
