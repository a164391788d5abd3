"""Latent weights and momenta in the machine's memory: all trits move end to end on a GPU that holds a block or two.

A block's latent weights come to the GPU when it runs, forward and once more in the backward pass, and while it runs the
next block's are on their way. In the backward pass each takes its step as soon as its gradient is known (`lean`), and
goes home beside what follows. What is computed is what is computed without.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from tritflow.distillation.bus import Bus, Load
from tritflow.modules.fake import FakeTernaryLinear


class OffloadedLatents:
    """Takes the moving latent weights of a model's blocks off the device until `close`, or the end of a `with`.

    Args:
        model: its blocks run again in the backward pass (gradient checkpointing), else nothing is saved.
        blocks: names of the blocks, in the order in which they run.
        device: where blocks run.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], device: torch.device | str) -> None:
        self._bus = Bus(device)
        self._blocks: list[Sequence[Tensor]] = []
        self._homes: dict[int, Tensor] = {}  # by a latent's id, as what follows
        self._momenta: dict[int, Tensor] = {}
        self._here: dict[int, Tensor] = {}
        self._momenta_here: dict[int, Tensor] = {}
        self._next: tuple[tuple[int, bool], Load] | None = None
        self._handles: list[Any] = []
        for place, name in enumerate(blocks):
            block = model.get_submodule(name)
            latents = [m.weight for m in block.modules() if isinstance(m, FakeTernaryLinear) and m.moves]
            for latent in latents:
                latent.data = self._homes[id(latent)] = self._bus.page_locked(latent.data)
            self._blocks.append(latents)
            self._handles += [
                block.register_forward_pre_hook(lambda *_, place=place: self._fetch(place)),
                block.register_forward_hook(lambda *_, place=place: self._leave(place)),
            ]

    def __contains__(self, parameter: Tensor) -> bool:
        return id(parameter) in self._homes

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def keep_momentum(self, parameter: Tensor, momentum: Tensor) -> Tensor:
        """Keep the momentum of a latent weight in memory too, whence it comes along in the backward pass; where it is
        kept. A second one takes the place of the first.
        """
        if (kept := self._momenta.get(id(parameter))) is not None:
            self.wait()
            return kept.copy_(momentum)
        self._momenta[id(parameter)] = self._bus.page_locked(momentum)
        return self._momenta[id(parameter)]

    def momentum(self, parameter: Tensor) -> Tensor:
        """Momentum on the device of a latent weight whose gradient is there, to be read."""
        return self._momenta_here[id(parameter)]

    def stepped(self, parameter: Tensor, momentum: Tensor) -> None:
        """Send a latent weight home that has taken its step, and its new momentum."""
        self._bus.send(parameter.data, self._homes[id(parameter)])
        self._bus.send(momentum, self._momenta[id(parameter)])
        self._let_go(parameter)

    def settle(self) -> None:
        """After a backward pass: latent weights that had no gradient go home as they came."""
        for parameter in list(self._here.values()):
            self._let_go(parameter)
        self._forget_next()
        for _ in range(2):
            self._bus.turn()

    def wait(self) -> None:
        """Until what was sent home is there; before the machine's memory is read."""
        self._bus.wait()

    def close(self) -> None:
        """Leave all latent weights in the machine's memory, unlocked, and let the blocks run as they did."""
        self.settle()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._bus.close()

    def _fetch(self, place: int) -> None:
        # A block that runs inside of a backward pass runs for its gradients: momenta are needed too, and the one before
        # it is next.
        backward = torch._C._current_graph_task_id() != -1
        latents = self._blocks[place]
        if any(id(latent) not in self._here for latent in latents):
            if backward:
                self._bus.turn()
            self._bring(place, backward)
            assert self._next is not None
            (_, load), self._next = self._next, None
            tensors = self._bus.arrive(load)
            for latent, tensor in zip(latents, tensors, strict=False):
                latent.data, self._here[id(latent)] = tensor, latent
            for latent, tensor in zip(self._with_momentum(place), tensors[len(latents) :], strict=False):
                self._momenta_here[id(latent)] = tensor
        following = place - 1 if backward else place + 1
        if 0 <= following < len(self._blocks):
            self._bring(following, backward)

    def _bring(self, place: int, backward: bool) -> None:
        if self._next is not None and self._next[0] == (place, backward):
            return
        self._forget_next()
        homes = [self._homes[id(latent)] for latent in self._blocks[place]]
        if backward:
            homes += [self._momenta[id(latent)] for latent in self._with_momentum(place)]
        self._next = (place, backward), self._bus.bring(homes)

    def _with_momentum(self, place: int) -> list[Tensor]:
        return [latent for latent in self._blocks[place] if id(latent) in self._momenta]

    def _forget_next(self) -> None:
        if self._next is not None:
            self._bus.arrive(self._next[1])
            self._next = None

    def _leave(self, place: int) -> None:
        # A block that runs again for its gradients is needed until they are there.
        if torch._C._current_graph_task_id() == -1:
            for latent in self._blocks[place]:
                self._let_go(latent)

    def _let_go(self, parameter: Tensor) -> None:
        self._momenta_here.pop(id(parameter), None)
        if self._here.pop(id(parameter), None) is not None:
            parameter.data = self._homes[id(parameter)]
