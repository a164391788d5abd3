"""Sampler states made while a student trains: a pool of trajectories, each a step further whenever it was trained on.

The teacher's velocity at a state is both the target there and the way to the next state, so fresh states cost one
teacher forward and no disk, and no state is seen twice: recorded ones are learnt by heart within a few epochs. Part
of the trajectories follow the student's velocity instead (DAgger, Ross et al. 2011): it learns to come back from where
its own errors lead. And since the teacher answers whatever it is asked, prompts may be mixed, and trajectories may end
early and begin again where errors matter most.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tritflow.calibration.trajectories import seed_of

Velocity = Callable[..., Tensor]
# Rows of the teacher's forward while the pool is filled, and at most four batches.
FILL = 1024


class OnlineStates:
    """A pool of flow-matching trajectories, x' = x + (sigma' - sigma) v.

    Every step takes one batch; an epoch takes each trajectory once, so phases stay as evenly spread as they begin.
    What is random in step number n depends on the seed and n alone: a run that is resumed goes on as it would have.

    Args:
        teacher: called with the transformer's keyword arguments, gives the velocity.
        prompts: tensors [P, ...] of every prompt by keyword, on the device.
        shared: tensors by keyword that all states have in common.
        sigmas: [J, S + 1] noise levels of J sampler schedules, falling to 0.
        guidance: values to draw from (None: the model takes none).
        shape: of one state.
        batch_size: B.
        batches: of the pool.
        student_share: of trajectories that follow the student.
        early_share: of the pool's places, whose trajectories end after `early_steps`.
        early_steps: of those.
        mixed_share: of trajectories whose prompt is a mixture of two.
        dtype: in which the transformer takes states and timesteps.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        teacher: Velocity,
        prompts: Mapping[str, Tensor],
        shared: Mapping[str, Tensor],
        sigmas: Tensor,
        guidance: Sequence[float] | None,
        shape: tuple[int, ...],
        *,
        batch_size: int,
        batches: int,
        student_share: float,
        dtype: torch.dtype,
        seed: int,
        early_share: float = 0.0,
        early_steps: int = 1,
        mixed_share: float = 0.0,
    ) -> None:
        self.teacher, self.prompts, self.shared, self.shape = teacher, dict(prompts), dict(shared), shape
        self.device = sigmas.device
        self.sigmas, self.steps = sigmas.float(), sigmas.shape[1] - 1
        self.guidance = None if guidance is None else torch.tensor(list(guidance), device=self.device)
        self.batch_size, self.batches, self.size = batch_size, batches, batch_size * batches
        self.student_share, self.dtype, self.seed = student_share, dtype, seed
        self.mixed_share = mixed_share
        # Places are short at even distances; which of them a batch takes is drawn anew each epoch.
        upto = (torch.arange(self.size + 1, device=self.device).double() * early_share).floor()
        self.short = upto.diff() > 0
        self.ends = torch.where(self.short, min(early_steps, self.steps), self.steps)
        self.count = len(next(iter(self.prompts.values())))
        self._order: tuple[int, Tensor] | None = None
        fresh = self._draw(torch.Generator(self.device).manual_seed(seed_of(seed)), self.size)
        self.state: dict[str, Tensor] = {
            "x": fresh.pop("noise"),
            "step": torch.zeros(self.size, dtype=torch.long, device=self.device),
            **fresh,
        }

    def _draw(self, generator: torch.Generator, rows: int) -> dict[str, Tensor]:
        """What a new trajectory needs, for each of `rows`."""
        options: Any = {"generator": generator, "device": self.device}
        drawn = {
            "noise": torch.randn(rows, *self.shape, **options),
            "prompt": torch.randint(self.count, (rows,), **options),
            "schedule": torch.randint(len(self.sigmas), (rows,), **options),
            "guidance": torch.randint(1 if self.guidance is None else len(self.guidance), (rows,), **options),
            "student": torch.rand(rows, **options) < self.student_share,
        }
        if self.mixed_share:
            drawn["other"] = torch.randint(self.count, (rows,), **options)
            mixed = torch.rand(rows, **options) < self.mixed_share
            drawn["mix"] = torch.where(mixed, torch.rand(rows, **options), 0.0)
        return drawn

    @torch.no_grad()
    def fill(self) -> None:
        """Spread the phases: of the trajectories of a length S, number i goes i mod S steps with the teacher."""
        number = torch.where(self.short, self.short.cumsum(0), (~self.short).cumsum(0)) - 1
        wanted = number % self.ends
        with torch.compiler.set_stance("force_eager"):  # its batches are of all sizes
            for done in range(int(wanted.max())):
                for rows in (wanted > done).nonzero()[:, 0].split(min(FILL, 4 * self.batch_size)):
                    velocity = self.velocity(self._kwargs(rows))
                    self.state["x"][rows] += self._width(rows) * velocity
                    self.state["step"][rows] += 1

    def draws(self, number: int) -> dict[str, Tensor]:
        """What is random in step `number`: which trajectories, and what follows those that end."""
        epoch, place = divmod(number, self.batches)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, 0, epoch))
            self._order = epoch, torch.randperm(self.size, generator=generator).to(self.device)
        rows = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        generator = torch.Generator(self.device).manual_seed(seed_of(self.seed, 1, number))
        return {"rows": rows, **self._draw(generator, self.batch_size)}

    @torch.no_grad()
    def inputs(self, draws: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The states of `draws`, as a transformer takes them."""
        return self._kwargs(draws["rows"])

    @torch.no_grad()
    def velocity(self, kwargs: Mapping[str, Tensor]) -> Tensor:
        """The teacher's, in its own dtype: the student's autocast is not for it."""
        with torch.autocast(self.device.type, enabled=False):
            return self.teacher(**kwargs).float()

    @torch.no_grad()
    def advance(self, draws: Mapping[str, Tensor], teacher: Tensor, student: Tensor) -> None:
        """Move the states of `draws` along their velocity; trajectories at their end start again."""
        rows, state = draws["rows"], self.state
        axes = (-1, *[1] * len(self.shape))
        velocity = torch.where(state["student"][rows].view(axes), student.float(), teacher.float())
        x = state["x"][rows] + self._width(rows) * velocity
        step = state["step"][rows] + 1
        ended = step >= self.ends[rows]
        state["x"][rows] = torch.where(ended.view(axes), draws["noise"], x)
        state["step"][rows] = torch.where(ended, 0, step)
        for name in state.keys() - {"x", "step"}:
            state[name][rows] = torch.where(ended, draws[name], state[name][rows])

    def _width(self, rows: Tensor) -> Tensor:
        schedule, step = self.state["schedule"][rows], self.state["step"][rows]
        return (self.sigmas[schedule, step + 1] - self.sigmas[schedule, step]).view(-1, *[1] * len(self.shape))

    def _kwargs(self, rows: Tensor) -> dict[str, Tensor]:
        state = self.state
        kwargs = {name: value[state["prompt"][rows]] for name, value in self.prompts.items()}
        if self.mixed_share:
            for name, value in self.prompts.items():
                mix = state["mix"][rows].view(-1, *[1] * (value.dim() - 1))
                other = value[state["other"][rows]]
                kwargs[name] = torch.lerp(kwargs[name].float(), other.float(), mix).to(value.dtype)
        kwargs |= self.shared
        sigma = self.sigmas[state["schedule"][rows], state["step"][rows]]
        kwargs["hidden_states"] = state["x"][rows].to(self.dtype)
        # As the sampler rounds it: the scheduler counts to 1000 in the model's dtype.
        kwargs["timestep"] = (sigma * 1000).to(self.dtype) / 1000
        if self.guidance is not None:
            kwargs["guidance"] = self.guidance[state["guidance"][rows]]
        return kwargs
