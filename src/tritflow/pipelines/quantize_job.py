"""What `tritflow quantize` decides before the first tensor is read: source, recipe, layers, prompts, device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tritflow.assets import ASSETS, asset_path
from tritflow.calibration.prompts import PromptSet, load_prompts, paper_prompts
from tritflow.config import Recipe, TernaryConfig
from tritflow.formats.locate import Location, resolve
from tritflow.formats.source import Source, open_source
from tritflow.models import FLUX1, Family, family_of
from tritflow.pipelines.demands import QuantizeError, check_memory, needs_teacher
from tritflow.pipelines.loading import pick_device
from tritflow.pipelines.scene_prompts import scene_prompts
from tritflow.pipelines.start import Start
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.recipes import DEFAULT, load_recipe, override, recipe_hash


@dataclass(frozen=True)
class Job:
    """Everything that is decided before the first tensor is read."""

    location: Location
    source: Source
    family: Family
    recipe: Recipe
    linears: dict[str, tuple[int, int]]
    skipped: int
    prompts: PromptSet | None
    base: str | None
    device: torch.device
    start: Start | None = None
    keep_latents: bool = False

    @property
    def ternary(self) -> TernaryConfig:
        return self.recipe.ternary

    @property
    def identity(self) -> dict[str, Any]:
        """What fixes the bytes: source, recipe with overrides, prompts."""
        found = {
            "source": self.source.fingerprint(),
            "recipe": recipe_hash(self.recipe),
            "prompts": self.prompts.sha256 if self.prompts else None,
        }
        return found if self.start is None else {**found, "start": self.start.identity}

    @property
    def id(self) -> str:
        """16 hex digits of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def weights(self) -> int:
        """How many weights the linears hold."""
        return sum(n * k for n, k in self.linears.values())

    def weight(self, linear: str) -> Tensor:
        """The dense weight [N, K] of a linear, on the job's device."""
        return self.source.tensor(f"{linear}.weight", self.device)

    def rounded(self, linear: str) -> Rounded:
        """A linear rounded from its weight alone."""
        return round_weight(self.weight(linear), self.recipe.ternarizer, column_scale=self.ternary.column_scale)


def plan(
    src: str | Path,
    recipe: str | Recipe = DEFAULT,
    *,
    mode: str | None = None,
    packing: str | None = None,
    skip: Sequence[str] = (),
    column_scale: bool | None = None,
    prompts: str | Path | PromptSet | None = None,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    start: str | Path | None = None,
    keep_latents: bool = False,
) -> Job:
    """Check everything that can be checked before work starts; arguments and errors as in `quantize.quantize`."""
    chosen = override(load_recipe(recipe) if isinstance(recipe, str) else recipe, settings)
    chosen = chosen if seed is None else _seeded(chosen, seed)
    given = {"mode": mode, "packing": packing, "column_scale": column_scale}
    stored = chosen.ternary.to_dict() | {k: v for k, v in given.items() if v is not None}
    stored["skip"] = [*chosen.ternary.skip, *skip]
    if chosen.smoothing is not None:
        if column_scale is False:
            raise QuantizeError(f"recipe {chosen.name} smooths inputs by column scales; drop --no-column-scale")
        stored["column_scale"] = True
    ternary = TernaryConfig.from_dict(stored)
    distillation, reconstruction = chosen.distillation, chosen.reconstruction
    if ternary.mode == "w2a8" and distillation.steps:
        distillation = dataclasses.replace(distillation, activation_bits=8)
    if ternary.mode == "w2a8" and reconstruction.steps:
        reconstruction = dataclasses.replace(reconstruction, activation_bits=8)
    chosen = dataclasses.replace(chosen, ternary=ternary, distillation=distillation, reconstruction=reconstruction)
    location = resolve(asset_path(str(src)) if str(src) in ASSETS else src)
    source = open_source(location.transformer)
    family = family_of(source.config)
    family.check_tensors(source.config, source.shapes())
    inside = family.block_linears(source.config)
    linears = {name: shape for name, shape in inside.items() if ternary.matches(name)}
    if not linears:
        raise QuantizeError(f"no linear of {src} matches targets {list(ternary.targets)}; nothing to quantize")
    for pattern in skip:
        if not any(TernaryConfig(targets=(pattern,)).matches(name) for name in inside):
            raise QuantizeError(f"--skip {pattern} matches none of the {len(inside)} block linears of {src}")
    begin = None if start is None else Start(start, source.fingerprint())
    if begin is not None:
        chosen = _started(chosen, begin, linears)
    if keep_latents and not chosen.distillation.steps:
        raise QuantizeError(f"recipe '{chosen.name}' distils nothing, so there are no latents to keep")
    if needs_teacher(chosen) and family is not FLUX1:
        raise QuantizeError(
            f"recipe '{chosen.name}' runs the model, which tritflow does for FLUX.1 only, and {src} is {family.name}; "
            "take --recipe fast or absmean"
        )
    on = pick_device(device)
    check_memory(chosen, sum(n * k for n, k in linears.values()), on)
    found = _calibration_prompts(location, prompts) if needs_teacher(chosen) else None
    return Job(
        location=location,
        source=source,
        family=family,
        recipe=chosen,
        linears=linears,
        skipped=len(inside) - len(linears),
        prompts=found,
        base=None if base is None else str(base),
        device=on,
        start=begin,
        keep_latents=keep_latents,
    )


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    """The same recipe with everything drawn anew."""
    return dataclasses.replace(
        recipe,
        calibration=dataclasses.replace(recipe.calibration, seed=seed),
        distillation=dataclasses.replace(recipe.distillation, seed=seed),
        reconstruction=dataclasses.replace(recipe.reconstruction, seed=seed),
    )


def _started(recipe: Recipe, start: Start, linears: Mapping[str, tuple[int, int]]) -> Recipe:
    """The recipe with nothing before distillation, and the student's kind of scales."""
    if not recipe.distillation.steps:
        raise QuantizeError(f"--start is where distillation goes on, and recipe '{recipe.name}' distils nothing")
    missing = next((name for name in linears if name not in start), None)
    if missing is not None:
        raise QuantizeError(f"{start.path} keeps '{missing}' dense, so it cannot be started from; --skip it")
    return dataclasses.replace(
        recipe,
        compensation=False,
        smoothing=None,
        smoothing_outliers=0.0,
        smoothing_skip=(),
        reconstruction=dataclasses.replace(recipe.reconstruction, steps=0),
        ternary=dataclasses.replace(recipe.ternary, column_scale=start.column_scale),
    )


def _calibration_prompts(location: Location, prompts: str | Path | PromptSet | None) -> PromptSet:
    if isinstance(prompts, PromptSet):
        return prompts
    if prompts is not None:
        return scene_prompts(str(prompts)) or load_prompts(prompts)
    own = location.pipeline / "calibration_prompts.txt" if location.pipeline else None
    return load_prompts(own) if own is not None and own.is_file() else paper_prompts()
