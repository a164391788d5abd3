"""Everything that a training run must find again after a kill: parameters, optimiser, average, losses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tritflow.calibration.artifacts import write_tensors
from tritflow.config import DistillationConfig
from tritflow.distillation.sharded import Ranks, put_, whole

CHECKPOINT = "checkpoint.safetensors"
BETAS = (0.9, 0.99)
# Velocity gradients of single weights are often below 1e-8, torch's default, which would damp their steps.
EPSILON = 1e-12


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate.

    Attributes:
        name: for messages.
        parameters: name -> fp32 parameter; names are unique over all groups.
        learning_rate: peak of the schedule.
        weight_decay: decoupled.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Saved:
    """Where a checkpoint stands."""

    step: int
    validation: dict[int, float]


class TrainingState:
    """Parameters with AdamW and an optional exponential moving average.

    Args:
        groups: see `ParameterGroup`; names must be unique.
        config: the run's settings.
        device: where the parameters are.
    """

    def __init__(self, groups: Sequence[ParameterGroup], config: DistillationConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.groups = [g for g in groups if g.parameters]
        self.named: dict[str, nn.Parameter] = {}
        for group in self.groups:
            for name, parameter in group.parameters.items():
                if name in self.named:
                    raise ValueError(f"parameter '{name}' is in two groups")
                self.named[name] = parameter
        if not self.named:
            raise ValueError("there is nothing to train: no parameter was given")
        self.parameters = list(self.named.values())
        # A captured step needs its rates and counters on the GPU; sharded parameters mix with no such tensors.
        self._on_gpu = on_gpu = device.type == "cuda" and Ranks.here().world == 1
        self._rates = [torch.zeros((), device=device) for _ in self.groups]
        self.optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in self.groups],
            betas=BETAS,
            eps=EPSILON,
            capturable=on_gpu,
            # One kernel over all parameters instead of a dozen passes.
            fused=on_gpu or None,
            foreach=None if on_gpu else True,
        )
        if on_gpu:
            for settings, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
                settings["lr"] = rate
        for p in self.parameters:
            # Filled now, so that a resumed run and a captured one start from tensors that exist.
            self.optimizer.state[p] = {
                "step": torch.zeros((), device=device if on_gpu else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
        self.average = [p.detach().clone() for p in self.parameters] if config.ema_decay > 0 else []
        self.losses = torch.zeros(config.steps, device=device)

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes (the loss record excepted), in a fixed order."""
        moments = [t for p in self.parameters for t in self.optimizer.state[p].values()]
        return [*(p.data for p in self.parameters), *moments, *self.average]

    def set_learning_rates(self, step: int) -> None:
        """Set every group's rate for step number `step`."""
        factor = learning_rate_factor(step, self.config)
        for group, rate, settings in zip(self.groups, self._rates, self.optimizer.param_groups, strict=True):
            if self._on_gpu:
                rate.fill_(group.learning_rate * factor)  # in place: a captured graph reads this very tensor
            else:
                settings["lr"] = group.learning_rate * factor

    @torch.no_grad()
    def update_average(self) -> None:
        """Move the average towards the parameters."""
        if self.average:
            torch._foreach_lerp_(self.average, [p.data for p in self.parameters], 1.0 - self.config.ema_decay)

    @torch.no_grad()
    def use_average(self) -> None:
        """Put the average, if there is one, into the parameters."""
        for parameter, average in zip(self.parameters, self.average, strict=False):
            parameter.copy_(average)

    def save(self, folder: Path, run: dict[str, Any], step: int, validation: dict[int, float]) -> None:
        """Write `folder/checkpoint.safetensors` atomically, whole tensors; all processes call, the first one writes."""
        ranks = Ranks.here()
        tensors = {"losses": self.losses}

        def keep(name: str, tensor: Tensor) -> None:
            full = whole(tensor)
            if ranks.first:
                tensors[name] = full.detach().cpu() if ranks.world > 1 else full

        for i, (name, parameter) in enumerate(self.named.items()):
            keep(f"parameter/{name}", parameter)
            for key, value in self.optimizer.state[parameter].items():
                keep(f"{key}/{name}", value)
            if self.average:
                keep(f"average/{name}", self.average[i])
        if ranks.first:
            note = {"run": run, "step": step, "validation": {str(k): v for k, v in validation.items()}}
            write_tensors(folder / CHECKPOINT, tensors, note)
        ranks.wait()

    @torch.no_grad()
    def load(self, folder: Path, run: dict[str, Any]) -> Saved | None:
        """Restore a checkpoint of the same run; None if there is none, or it is of another run.

        Raises:
            ValueError: it is damaged.
        """
        path = folder / CHECKPOINT
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                note = json.loads(stream.metadata()["tritflow"])
                if note["run"] != json.loads(json.dumps(run)):
                    return None
                self.losses.copy_(stream.get_tensor("losses"))
                for i, (name, parameter) in enumerate(self.named.items()):
                    put_(parameter, stream.get_tensor(f"parameter/{name}"))
                    for key, value in self.optimizer.state[parameter].items():
                        put_(value, stream.get_tensor(f"{key}/{name}"))
                    if self.average:
                        put_(self.average[i], stream.get_tensor(f"average/{name}"))
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to train again") from None
        return Saved(note["step"], {int(k): v for k, v in note["validation"].items()})


def learning_rate_factor(step: int, config: DistillationConfig) -> float:
    """Linear warm-up, then a cosine to zero over all steps; 1 at its highest."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    return warm * 0.5 * (1.0 + math.cos(math.pi * step / max(1, config.steps)))
