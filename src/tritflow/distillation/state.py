"""Everything that a training run must find again after a kill: parameters, optimisers, states, losses."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from tritflow.calibration.artifacts import write_tensors
from tritflow.config import DistillationConfig
from tritflow.distillation.lean import LeanMuon
from tritflow.distillation.muon import Muon
from tritflow.distillation.offload import OffloadedLatents
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
        parameters: name -> fp32 parameter (bf16 for a lean run's matrices); names are unique over all groups.
        learning_rate: peak of the schedule.
        weight_decay: decoupled.
        matrices: whether they are weight matrices, which Muon may take.
        factors: name -> [K], by which Muon's steps are multiplied column by column; of some of the parameters.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    learning_rate: float
    weight_decay: float = 0.0
    matrices: bool = False
    factors: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """Where a checkpoint stands: its step, the validation errors until then, and how often the run went back."""

    step: int
    validation: dict[int, float]
    retreats: list[dict[str, Any]] = field(default_factory=list)


class TrainingState:
    """Parameters and their optimisers: AdamW, and Muon for matrices where the config asks for it.

    There is no moving average: latent weights that are averaged round to trits that were never trained together
    (docs/LOG.md: twice the error).

    Args:
        groups: see `ParameterGroup`; names must be unique.
        config: the run's settings.
        device: where the parameters are.
        extra: further tensors that a step changes in place, kept and found again with the rest; each of several
            processes has its rows of them.
        offload: keeps latent weights in the machine's memory (lean alone).
    """

    def __init__(
        self,
        groups: Sequence[ParameterGroup],
        config: DistillationConfig,
        device: torch.device,
        extra: Mapping[str, Tensor] | None = None,
        offload: OffloadedLatents | None = None,
    ) -> None:
        self.offload = offload
        self.config, self.device, self.extra = config, device, dict(extra or {})
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
        self.sharded = any(hasattr(p, "device_mesh") for p in self.parameters)
        self.replicated = Ranks.here().world > 1 and not self.sharded
        self._on_gpu = device.type == "cuda" and not self.sharded
        by_muon = [g for g in self.groups if g.matrices and config.optimizer == "muon"]
        by_adam = [g for g in self.groups if g not in by_muon]
        self._rates = {g.name: torch.zeros((), device=device) for g in self.groups}
        self._muon = [self._muon_of(g) for g in by_muon]
        self._momenta = {id(p): m for muon in self._muon for p, m in muon.momenta()}
        self._adam = self._adamw(by_adam) if by_adam else None
        self._adam_groups = by_adam
        self.clipped = [p for g in by_adam for p in g.parameters.values()]
        self.losses = torch.zeros(config.steps, device=device)
        self.rate = 1.0  # by which the schedule is multiplied

    def _muon_of(self, group: ParameterGroup) -> Muon | LeanMuon:
        rate = self._rates[group.name]
        factors = {id(group.parameters[name]): f.to(self.device) for name, f in group.factors.items()}
        settings: dict[str, Any] = {"weight_decay": group.weight_decay, "factors": factors}
        if self.config.lean:
            return LeanMuon(group.parameters.values(), rate, seed=self.config.seed, offload=self.offload, **settings)
        return Muon(group.parameters.values(), rate, **settings)

    def _adamw(self, groups: Sequence[ParameterGroup]) -> torch.optim.AdamW:
        on_gpu = self._on_gpu
        optimizer = torch.optim.AdamW(
            [{"params": list(g.parameters.values()), "weight_decay": g.weight_decay} for g in groups],
            betas=BETAS,
            eps=EPSILON,
            capturable=on_gpu,
            # One kernel over all parameters instead of a dozen passes.
            fused=on_gpu or None,
            foreach=None if on_gpu else True,
        )
        for group, settings in zip(groups, optimizer.param_groups, strict=True):
            if on_gpu:
                settings["lr"] = self._rates[group.name]
            for p in group.parameters.values():
                # Filled now, so that a resumed run and a captured one start from tensors that exist.
                optimizer.state[p] = {
                    "step": torch.zeros((), device=self.device if on_gpu else "cpu"),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        return optimizer

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """What the optimiser remembers of a parameter."""
        momentum = self._momenta.get(id(parameter))
        if momentum is not None:
            return {"momentum": momentum}
        assert self._adam is not None
        moments: dict[str, Tensor] = self._adam.state[parameter]
        return moments

    def tensors(self) -> list[Tensor]:
        """Every tensor that a step changes (the loss record excepted), in a fixed order."""
        moments = [t for p in self.parameters for t in self._moments(p).values()]
        return [*(p.data for p in self.parameters), *moments, *self.extra.values()]

    def set_learning_rates(self, step: int) -> None:
        """Set every group's rate for step number `step`."""
        moving = 1 - self.config.freeze_share
        rates = {
            group.name: group.learning_rate
            * self.rate
            * learning_rate_factor(step, self.config, moving if group.matrices else 1.0)
            for group in self.groups
        }
        for name, rate in rates.items():
            self._rates[name].fill_(rate)  # in place: a captured graph reads this tensor
        for muon in self._muon:
            if isinstance(muon, LeanMuon):
                muon.begin(step)
        if self._adam is not None and not self._on_gpu:
            for group, settings in zip(self._adam_groups, self._adam.param_groups, strict=True):
                settings["lr"] = rates[group.name]

    def zero_grad(self) -> None:
        """Forget all gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def step(self) -> None:
        """Move every parameter by its gradient."""
        for muon in self._muon:
            muon.step()
        if self._adam is not None:
            self._adam.step()

    def close(self) -> None:
        """After the last step, or one that broke off: parameters take no more steps of their own."""
        for muon in self._muon:
            if isinstance(muon, LeanMuon):
                muon.close()

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every parameter is finite, in all processes."""
        self._wait()
        local = (p.to_local() if hasattr(p, "to_local") else p for p in self.parameters)
        sums = [p.sum(dtype=torch.float64).to(self.device) for p in local]
        return math.isfinite(float(Ranks.here().mean(torch.stack(sums).sum())))

    def save(
        self,
        folder: Path,
        run: dict[str, Any],
        step: int,
        validation: dict[int, float],
        retreats: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Write `folder/checkpoint.safetensors` atomically, whole tensors; all processes call, the first one writes."""
        self._wait()
        ranks = Ranks.here()
        tensors = {"losses": self.losses}

        def keep(name: str, tensor: Tensor) -> None:
            full = whole(tensor)
            if ranks.first:
                tensors[name] = full.detach().cpu() if ranks.world > 1 else full

        for name, parameter in self.named.items():
            keep(f"parameter/{name}", parameter)
            for key, value in self._moments(parameter).items():
                keep(f"{key}/{name}", value)
        for name, value in self.extra.items():
            keep(f"extra/{name}", ranks.joined(value))
        if ranks.first:
            note = {"run": run, "step": step, "validation": {str(k): v for k, v in validation.items()}}
            note |= {"retreats": list(retreats)} if retreats else {}
            write_tensors(folder / CHECKPOINT, tensors, note)
        ranks.wait()

    def _wait(self) -> None:
        """Before parameters are read that may be on their way to the machine's memory."""
        if self.offload is not None:
            self.offload.wait()

    @torch.no_grad()
    def load(self, folder: Path, run: dict[str, Any], name: str = CHECKPOINT) -> Saved | None:
        """Restore a checkpoint of the same run; None if there is none, or it is of another run.

        Raises:
            ValueError: it is damaged.
        """
        path = folder / name
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as stream:
                note = json.loads(stream.metadata()["tritflow"])
                if note["run"] != json.loads(json.dumps(run)):
                    return None
                self.losses.copy_(stream.get_tensor("losses"))
                for name, parameter in self.named.items():
                    put_(parameter, stream.get_tensor(f"parameter/{name}"))
                    for key, value in self._moments(parameter).items():
                        put_(value, stream.get_tensor(f"{key}/{name}"))
                for name, value in self.extra.items():
                    put_(value, Ranks.here().part(stream.get_tensor(f"extra/{name}")))
        except (SafetensorError, KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}); remove it to train again") from None
        return _saved(note)

    def note(self, folder: Path, run: dict[str, Any], name: str) -> Saved | None:
        """Where a checkpoint of the same run stands, without restoring it; None if there is none that can be read."""
        try:
            with safe_open(folder / name, framework="pt") as stream:
                note = json.loads(stream.metadata()["tritflow"])
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None
        return _saved(note) if note["run"] == json.loads(json.dumps(run)) else None


def _saved(note: dict[str, Any]) -> Saved:
    return Saved(note["step"], {int(k): v for k, v in note["validation"].items()}, note.get("retreats", []))


def learning_rate_factor(step: int, config: DistillationConfig, share: float = 1.0) -> float:
    """Linear warm-up, then a cosine to zero over the first `share` of the steps; 1 at its highest."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, config.steps) / share)))
