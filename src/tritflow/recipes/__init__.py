"""Named experiments: `--recipe NAME` reads `NAME.toml` of this folder, `--recipe PATH.toml` any other file.

A recipe is the whole experiment: rounding, compensation, calibration, distillation, storage. A new experiment is
a new file, never a new script.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from tritflow.config import (
    CalibrationConfig,
    ConfigError,
    DistillationConfig,
    OnlineConfig,
    Recipe,
    ReconstructionConfig,
    StreamingConfig,
    TernaryConfig,
    nearest,
)

_TABLES: dict[str, Any] = {
    "ternary": TernaryConfig,
    "calibration": CalibrationConfig,
    "streaming": StreamingConfig,
    "reconstruction": ReconstructionConfig,
    "distillation": DistillationConfig,
    "online": OnlineConfig,
}
DEFAULT = "fast"
# Settings that came later, by table: left out of the hash at their defaults, so that older jobs are known again.
_LATER = {
    "distillation": (
        "damp_columns",
        "detail_weight",
        "early_weight",
        "retreats",
        "retreat_above",
        "freeze_share",
        "feature_weight",
        "lean",
    ),
    "reconstruction": ("optimizer",),
    "online": ("early_share", "early_steps", "mixed_share"),
}


def recipe_names() -> list[str]:
    """Names of the recipes in the package, sorted."""
    return sorted(
        entry.name.removesuffix(".toml")
        for entry in resources.files(__name__).iterdir()
        if entry.name.endswith(".toml")
    )


def load_recipe(name: str | Path) -> Recipe:
    """A recipe of the package by name, or any .toml file by path.

    Raises:
        ConfigError: no such recipe (the nearest is named), not TOML, or an unknown or impossible setting.
    """
    text, label = _read(str(name))
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name} is not TOML: {error}") from None
    return _build(data, label, name)


def override(recipe: Recipe, settings: Sequence[str]) -> Recipe:
    """A recipe with some settings changed.

    Args:
        recipe: as loaded.
        settings: "table.key=value" or "key=value" each, the value as TOML has it; a word needs no quotes.

    Raises:
        ConfigError: a setting that is none, or that cannot be.
    """
    if not settings:
        return recipe
    data = {k: v for k, v in recipe_dict(recipe).items() if k != "name" and v is not None}
    for setting in settings:
        key, equals, value = setting.partition("=")
        given = (_toml(f"{key} = {value}") or _toml(f'{key} = "{value}"')) if equals and value else {}
        if not given:
            raise ConfigError(f"--set {setting}: write TABLE.KEY=VALUE, such as distillation.steps=20000")
        for name, changed in given.items():
            here = data.get(name)
            data[name] = here | changed if isinstance(here, dict) and isinstance(changed, dict) else changed
    return _build(data, recipe.name, recipe.name)


def _toml(text: str) -> dict[str, Any]:
    """What a line of TOML says; nothing where it is none."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}


def _build(data: dict[str, Any], label: str, name: str | Path) -> Recipe:
    known = [f.name for f in dataclasses.fields(Recipe) if f.name != "name"]
    for key in data:
        if key not in known:
            raise ConfigError(f"recipe {name} has an unknown setting '{key}'{nearest(key, known)}")
    parts: dict[str, Any] = dict(data)
    if isinstance(data.get("smoothing_skip"), list):
        parts["smoothing_skip"] = tuple(data["smoothing_skip"])
    for table, cls in _TABLES.items():
        section = data.get(table, {})
        if not isinstance(section, dict):
            raise ConfigError(f"recipe {name}: [{table}] must be a table")
        try:
            parts[table] = cls.from_dict(section)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"recipe {name}, [{table}]: {error}") from None
    recipe = Recipe(name=label, **parts)
    _check(recipe)
    return recipe


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain JSON types."""
    data: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(recipe)))
    return data


def recipe_hash(recipe: Recipe) -> str:
    """16 hex digits over everything that changes the result: all but name, summary and where things lie meanwhile."""
    data = {k: v for k, v in recipe_dict(recipe).items() if k not in ("name", "summary", "streaming")}
    for name, default in (("smoothing_outliers", 0.0), ("smoothing_skip", [])):
        if data[name] == default:
            del data[name]
    for table, names in _LATER.items():
        defaults = _TABLES[table]().to_dict()
        for name in names:
            if data[table][name] == defaults[name]:
                del data[table][name]
    if recipe.online == OnlineConfig():  # as the budget below
        del data["online"]
    budget = recipe.streaming.budget_bytes
    if budget != StreamingConfig().budget_bytes:  # left out at its default: jobs from before there was one go on
        data["activation_budget"] = budget
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


LARGE_FROM = 1_000_000_000
"""Weights from which `balanced` fits no single GPU any more: 16 bytes each for latents, gradients and optimiser."""


def advice(name: str | Path, weights: int) -> str | None:
    """One line after a recipe that only rounds, on what keeps the pictures; None after one that learns.

    Args:
        name: as in `load_recipe`.
        weights: of all ternary linears.
    """
    recipe = load_recipe(name)
    steps = recipe.reconstruction.steps + recipe.distillation.steps
    if recipe.compensation or steps or recipe.smoothing is not None:
        return None
    large = "large (one 24-80 GB GPU), large-offloaded (with 64 GB of memory) or large-distilled (one of 80 GB)"
    better = large if weights >= LARGE_FROM else "balanced (a GPU), or demo (minutes on a CPU)"
    return (
        f"recipe {recipe.name} only rounds, and rounding alone breaks pictures; to keep them, into another OUT: "
        f"--recipe {better}; prompts come from the model folder, --prompts FILE or `tritflow prompts fetch`; "
        "no images are needed"
    )


def _read(name: str) -> tuple[str, str]:
    if name.endswith(".toml"):
        path = Path(name)
        try:
            return path.read_text(encoding="utf-8"), path.stem
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
            raise ConfigError(f"recipe {path}: {reason}") from None
    names = recipe_names()
    if name not in names:
        raise ConfigError(f"no recipe '{name}'{nearest(name, names)} (there are: {', '.join(names)})")
    return resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8"), name


def _check(recipe: Recipe) -> None:
    """Settings that are each allowed but not together, or out of range."""
    c, d, r = recipe.calibration, recipe.distillation, recipe.reconstruction
    positive = {
        "calibration.num_inference_steps": c.num_inference_steps,
        "calibration.batch_size": c.batch_size,
        "distillation.batch_size": d.batch_size,
        "reconstruction.window": r.window,
        "reconstruction.stride": r.stride,
        "reconstruction.samples": r.samples,
        "reconstruction.batch_size": r.batch_size,
        "compensation_samples": recipe.compensation_samples,
        "online.num_inference_steps": recipe.online.num_inference_steps,
    }
    for key, value in positive.items():
        if not isinstance(value, int) or value < 1:
            raise ConfigError(f"recipe {recipe.name}: {key} must be at least 1, not {value!r}")
    if recipe.ternarizer not in ("absmean", "mse"):
        options = ["absmean", "mse"]
        raise ConfigError(
            f"recipe {recipe.name}: ternarizer '{recipe.ternarizer}' is not one of {', '.join(options)}"
            f"{nearest(str(recipe.ternarizer), options)}"
        )
    if d.activation_bits not in (8, 16):
        raise ConfigError(f"recipe {recipe.name}: distillation.activation_bits is 8 or 16, not {d.activation_bits}")
    if r.activation_bits not in (8, 16):
        raise ConfigError(f"recipe {recipe.name}: reconstruction.activation_bits is 8 or 16, not {r.activation_bits}")
    if recipe.online.pool < 0 or (recipe.online.pool and not d.steps):
        raise ConfigError(f"recipe {recipe.name}: online.pool feeds distillation; give distillation.steps, or pool = 0")
    o = recipe.online
    for key in ("student_share", "early_share", "mixed_share"):
        if not 0 <= getattr(o, key) <= 1:
            raise ConfigError(f"recipe {recipe.name}: online.{key} lies between 0 and 1")
    if not 1 <= o.early_steps <= o.num_inference_steps and o.early_share:
        raise ConfigError(f"recipe {recipe.name}: online.early_steps lies between 1 and {o.num_inference_steps}")
    if r.stride > r.window:
        raise ConfigError(
            f"recipe {recipe.name}: reconstruction.stride {r.stride} leaves out blocks between windows of {r.window}"
        )
    if not c.guidance_scales:
        raise ConfigError(f"recipe {recipe.name}: calibration.guidance_scales is empty")
    if min(d.learning_rate, d.scale_learning_rate, d.column_learning_rate, d.rest_learning_rate) < 0:
        raise ConfigError(f"recipe {recipe.name}: a learning rate of distillation is negative")
    if min(d.detail_weight, d.early_weight) <= -1:
        raise ConfigError(f"recipe {recipe.name}: detail_weight and early_weight of distillation lie above -1")
    if d.retreats < 0 or d.retreat_above <= 1:
        raise ConfigError(f"recipe {recipe.name}: distillation.retreats is 0 or more, retreat_above above 1")
    a = recipe.smoothing
    if a is not None and not (isinstance(a, int | float) and not isinstance(a, bool) and 0 <= a <= 1):
        raise ConfigError(f"recipe {recipe.name}: smoothing must lie between 0 and 1, not {a!r}")
    ratio, skip = recipe.smoothing_outliers, recipe.smoothing_skip
    if not isinstance(ratio, int | float) or isinstance(ratio, bool) or not (ratio == 0 or ratio > 1):
        raise ConfigError(f"recipe {recipe.name}: smoothing_outliers is a ratio above 1, or 0, not {ratio!r}")
    if not isinstance(skip, tuple) or not all(isinstance(p, str) for p in skip):
        raise ConfigError(f"recipe {recipe.name}: smoothing_skip is a list of patterns, not {skip!r}")
    if a is None and (ratio or skip):
        raise ConfigError(f"recipe {recipe.name}: smoothing_outliers and smoothing_skip need smoothing, such as 0.0")
    if d.damp_columns and d.optimizer != "muon":
        raise ConfigError(f'recipe {recipe.name}: distillation.damp_columns is for optimizer = "muon"')
    if d.lean and (d.optimizer != "muon" or d.feature_weight):
        raise ConfigError(
            f'recipe {recipe.name}: distillation.lean is for optimizer = "muon", whose matrices step one by one, and '
            "keeps no hidden states for feature_weight"
        )
    if recipe.streaming.latent_store == "ram" and d.steps and not (d.lean and d.learning_rate):
        raise ConfigError(
            f'recipe {recipe.name}: streaming.latent_store = "ram" needs a distillation with lean = true '
            "and a learning_rate above 0"
        )
    if d.feature_weight < 0 or (d.feature_weight and not recipe.online.pool):
        raise ConfigError(
            f"recipe {recipe.name}: distillation.feature_weight is 0 or more, and needs the teacher of online.pool"
        )
    if not 0 <= d.freeze_share < 1:
        raise ConfigError(f"recipe {recipe.name}: distillation.freeze_share is at least 0 and below 1")
    if a is not None and recipe.ternarizer == "absmean":
        raise ConfigError(f"recipe {recipe.name}: smoothing needs the mse ternarizer; absmean has no column scales")
    if recipe.compensation and recipe.ternarizer == "absmean":
        raise ConfigError(
            f"recipe {recipe.name}: compensation starts from the mse ternarizer; absmean has no use for it"
        )
