"""The whole job behind `tritflow quantize`: a dense FLUX checkpoint in, a ternary model folder out.

Recipes without calibration stream: a tensor is read, rounded, packed and written before the next is touched. The
others record the teacher, compensate and distil in `OUT/.work`, then write through the same writer. Every stage
keeps what it finished, so the same command after a kill goes on, and ends in the same bytes.
"""

from __future__ import annotations

import dataclasses
import filecmp
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tritflow.assets import ASSETS, asset_path
from tritflow.calibration.artifacts import provenance, read_json, write_bytes, write_json
from tritflow.calibration.prompts import PromptSet, load_prompts, paper_prompts
from tritflow.config import Packing, Recipe, TernaryConfig
from tritflow.distillation.sharded import Ranks, processes
from tritflow.formats.atomic import atomic_file
from tritflow.formats.locate import Location, resolve
from tritflow.formats.source import Source, open_source
from tritflow.formats.writer import TransformerWriter
from tritflow.models import FLUX1, Family, family_of
from tritflow.pipelines.loading import pick_device
from tritflow.pipelines.records import RECORDS
from tritflow.pipelines.scene_prompts import scene_prompts
from tritflow.pipelines.start import LATENTS, Start, write_latents
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.recipes import DEFAULT, load_recipe, override, recipe_dict, recipe_hash

WORK = ".work"
COMPONENTS_LIMIT = 1 << 30
_COPIED = {".json", ".txt", ".model", ".safetensors", ".md", ".jinja"}

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total). Stages: `round`, `record`, `range`, `compensate`, `reconstruct`, `distill`, `write`,
`copy`."""


class QuantizeError(ValueError):
    """The source, the output folder or the combination of options cannot work. Says which and what to do."""


@dataclass(frozen=True)
class QuantizeReport:
    """What was made.

    Attributes:
        transformer: the ternary transformer folder.
        linears: how many linears are ternary.
        weights: how many weights they hold.
        skipped: block linears that stayed dense by `--skip`.
        digest: of the written tensors.
        components: whether the rest of the pipeline was copied beside it.
        validation: velocity MSE on held-out trajectories by step; empty without distillation.
        resumed: the job had been finished before, nothing was done.
        retreats: each time distillation diverged and went back; see `DistillationResult`.
    """

    transformer: Path
    linears: int
    weights: int
    skipped: int
    digest: str
    components: bool
    validation: dict[int, float]
    resumed: bool = False
    retreats: Sequence[Mapping[str, Any]] = ()


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


def quantize(
    src: str | Path,
    out: str | Path,
    recipe: str | Recipe = DEFAULT,
    *,
    mode: str | None = None,
    packing: Packing | str | None = None,
    skip: Sequence[str] = (),
    column_scale: bool | None = None,
    prompts: str | Path | PromptSet | None = None,
    base: str | Path | None = None,
    device: str | torch.device | None = None,
    seed: int | None = None,
    settings: Sequence[str] = (),
    start: str | Path | None = None,
    keep_latents: bool = False,
    full: bool = False,
    overwrite: bool = False,
    keep_work: bool = False,
    on_progress: Progress | None = None,
) -> QuantizeReport:
    """Turn a dense FLUX checkpoint into a ternary model folder.

    Started by `torchrun`, every process calls this alike: distillation is spread over them, the first does all else.

    Args:
        src: a pipeline folder, a transformer folder, a single safetensors file, a hub id, or `small`.
        out: `out/transformer` is written, and `out/meta.json`; an unfinished job there is continued. Recipes that
            compensate or reconstruct also write `out/calibration_records.jsonl`: which recorded pairs they used.
        recipe: a name, a path to a .toml, or a `Recipe`.
        mode, packing, column_scale: override the recipe's. `w2a8` also puts 8-bit activations into the training loops.
        skip: patterns of block linears that stay dense, beside the recipe's own.
        prompts: for calibration: a .txt, .jsonl or folder, or `scenes:N`, N captions of the built-in world. None:
            `calibration_prompts.txt` of the model folder, or the paper's set from the cache.
        base: pipeline that gives text encoders to a bare transformer, where the recipe needs them.
        device: where rounding and training run (None: the best there is).
        seed: of calibration's noise and choice of prompts, and of every order of training (None: the recipe's).
        settings: further changes of the recipe, see `recipes.override`.
        start: a finished student of the same source that distillation goes on from, in the place of the recipe's
            rounding, compensation and reconstruction.
        keep_latents: also write `out/latents.safetensors`, from which another run may go on (a byte a weight).
        full: copy the other components even above 1 GiB.
        overwrite: replace what an earlier `quantize` wrote to `out`.
        keep_work: keep trajectories and checkpoints in `out/.work`.
        on_progress: see `Progress`.

    Raises:
        QuantizeError, CheckpointError, FamilyError, ConfigError, PromptsError, ModelError: one line each.
        DiskFullError: no space left; the same call resumes.
    """
    out = Path(out)
    job = plan(
        src, recipe, mode=mode, packing=packing, skip=skip, column_scale=column_scale, prompts=prompts, base=base,
        device=device, seed=seed, settings=settings, start=start, keep_latents=keep_latents,
    )  # fmt: skip
    progress = on_progress or (lambda stage, done, total: None)
    with processes(job.device) as ranks:
        if ranks.first:
            return _quantize(job, out, full, overwrite, keep_work, progress, ranks)
        if ranks.agree(0):
            from tritflow.pipelines.student import learn

            learn(job, out / WORK, lambda stage, done, total: None)
        ranks.wait()
    return _report(out, job, read_json(out / "meta.json"))


def _quantize(
    job: Job, out: Path, full: bool, overwrite: bool, keep_work: bool, progress: Progress, ranks: Ranks
) -> QuantizeReport:
    _check_out(out, job, overwrite)
    meta = _meta(job)
    previous = read_json(out / "meta.json") if (out / "meta.json").is_file() else None
    if job.keep_latents and not (out / LATENTS).is_file() and _distilled(out, job, previous):
        raise QuantizeError(f"{out} was distilled without --keep-latents; drop it, or --overwrite to distil again")
    if previous and previous["complete"]:
        ranks.agree(0)
        ranks.wait()
        return _report(out, job, previous, resumed=True)
    write_json(out / "meta.json", meta)
    work = out / WORK
    validation: dict[int, float] = {}
    rest: Mapping[str, Tensor] = {}
    retreats: list[dict[str, Any]] = []
    if ranks.agree(needs_teacher(job.recipe)):
        from tritflow.pipelines.student import learn

        learned = learn(job, work, progress)
        validation, rounded, rest, stage = learned.validation, learned.rounded, learned.rest, "write"
        retreats = learned.retreats
    else:
        rounded, stage = _round_one(job), "round"
    digest = _write(job, out / "transformer", rounded, rest, stage, progress)
    copied, left_out = _copy_components(job, out, full, progress)
    meta |= {
        "complete": True,
        "digest": digest,
        "validation_mse": {str(step): mse for step, mse in sorted(validation.items())},
        "components": copied,
    }
    if job.keep_latents:
        write_latents(out / LATENTS, load_file(work / LATENTS), digest)
    if retreats:
        meta["retreats"] = retreats
    if left_out is not None:
        meta["base"] = left_out
    if (work / RECORDS).is_file():
        write_bytes(out / RECORDS, (work / RECORDS).read_bytes())
    write_json(out / "meta.json", meta)
    if not keep_work:
        shutil.rmtree(work, ignore_errors=True)
    ranks.wait()
    return _report(out, job, meta)


def _distilled(out: Path, job: Job, previous: Mapping[str, Any] | None) -> bool:
    """Whether distillation is over and its latents are gone."""
    work = out / WORK
    learned = (work / "learned.json").is_file() and read_json(work / "learned.json").get("job") == job.id
    return bool(previous and previous["complete"]) or (learned and not (work / LATENTS).is_file())


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
    """Check everything that can be checked before work starts; arguments and errors as in `quantize`."""
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
    _check_memory(chosen, sum(n * k for n, k in linears.values()), on)
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


def needs_teacher(recipe: Recipe) -> bool:
    """Whether a recipe runs the model (for its activations, or to distil), instead of streaming weights."""
    trained = recipe.reconstruction.steps > 0 or recipe.distillation.steps > 0
    return recipe.compensation or recipe.smoothing is not None or trained


def training_bytes(recipe: Recipe, weights: int) -> int:
    """What end-to-end distillation of so many weights keeps on one device beside its activations; 0 without it.

    fp32 latent weights, gradients, and one moment (Muon) or two (AdamW).
    """
    copies = 3 if recipe.distillation.optimizer == "muon" else 4
    return 4 * copies * weights if recipe.distillation.steps else 0


def _check_memory(recipe: Recipe, weights: int, device: torch.device) -> None:
    """Say before hours of calibration that distillation will not fit."""
    needed = training_bytes(recipe, weights)
    if not needed or device.type != "cuda":
        return
    world = int(os.environ.get("WORLD_SIZE", "1"))
    there = torch.cuda.get_device_properties(device).total_memory
    if needed > world * there:
        raise QuantizeError(
            f"recipe '{recipe.name}' distils {weights / 1e9:.1f} G weights end to end, which takes {needed / 1e9:.0f} "
            f"GB, and {world} x {device} has {world * there / 1e9:.0f} GB; take --recipe large (block reconstruction), "
            "a copy of the recipe with distillation.steps = 0, or more GPUs by torchrun"
        )


def _calibration_prompts(location: Location, prompts: str | Path | PromptSet | None) -> PromptSet:
    if isinstance(prompts, PromptSet):
        return prompts
    if prompts is not None:
        return scene_prompts(str(prompts)) or load_prompts(prompts)
    own = location.pipeline / "calibration_prompts.txt" if location.pipeline else None
    return load_prompts(own) if own is not None and own.is_file() else paper_prompts()


def _round_one(job: Job) -> Callable[[str, Tensor], Rounded]:
    def rounded(name: str, weight: Tensor) -> Rounded:
        return round_weight(weight.to(job.device), job.recipe.ternarizer, column_scale=job.ternary.column_scale)

    return rounded


def _write(
    job: Job,
    folder: Path,
    rounded: Callable[[str, Tensor], Rounded],
    rest: Mapping[str, Tensor],
    stage: str,
    progress: Progress,
) -> str:
    """Stream the source through `rounded` into the folder, dense tensors as they are or as `rest` has them; what is
    there already is skipped. Returns the digest."""
    writer = TransformerWriter(folder, job.ternary, job.id)
    names = job.source.names()
    present = set(names)
    for done, name in enumerate(names, 1):
        module, _, kind = name.rpartition(".")
        if module not in job.linears:
            if name not in writer:
                dense = job.source.tensor(name)
                writer.add_dense(name, rest[name].to(dense.dtype) if name in rest else dense)
        elif kind == "weight" and module not in writer:
            q = rounded(module, job.source.tensor(name))
            bias = job.source.tensor(f"{module}.bias") if f"{module}.bias" in present else None
            if bias is not None and q.bias is not None:
                bias = q.bias.to(bias.dtype)
            column = q.input_scale.cpu() if q.input_scale is not None else None
            writer.add_linear(module, q.trits, q.weight_scale.cpu(), column, bias)
        progress(stage, done, len(names))
    return writer.finish(job.source.config)


def _copy_components(job: Job, out: Path, full: bool, progress: Progress) -> tuple[bool, str | None]:
    """Copy the pipeline's other components, small ones or all; else say where they are to be found."""
    if job.location.pipeline is None:
        return False, job.base
    root = job.location.pipeline
    files = [
        path
        for path in sorted(root.rglob("*"))
        if path.is_file()
        and path.suffix in _COPIED
        and path.relative_to(root).parts[0] not in ("transformer", "meta.json")
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
        and (path.parent == root) <= (path.suffix != ".safetensors")
    ]
    if sum(path.stat().st_size for path in files) > COMPONENTS_LIMIT and not full:
        return False, str(root.resolve())
    # The index comes last: with it, the folder says that it is a whole pipeline.
    files.sort(key=lambda path: path.name == "model_index.json")
    for done, path in enumerate(files, 1):
        target = out / path.relative_to(root)
        # By content: a component may have changed without changing its size.
        if not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(target) as stream, path.open("rb") as origin:
                shutil.copyfileobj(origin, stream, 1 << 20)
        progress("copy", done, len(files))
    return True, None


def _check_out(out: Path, job: Job, overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise QuantizeError(f"{out} is a file; give a folder to write to")
    sources = {job.location.transformer.resolve(), job.location.transformer.resolve().parent}
    if out.resolve() in sources:
        raise QuantizeError(f"{out} is where the source lies; write to another folder")
    meta = out / "meta.json"
    ours = meta.is_file() and read_json(meta).get("kind") == "ternary"
    if ours and read_json(meta).get("job") == job.id and not overwrite:
        return
    if ours and overwrite:
        for path in (out / "transformer", out / WORK):
            shutil.rmtree(path, ignore_errors=True)
        meta.unlink()
    elif ours:
        raise QuantizeError(f"{out} holds the result of another source, recipe or prompts; --overwrite replaces it")
    elif (out / "transformer").exists() or meta.exists() or (out / "model_index.json").exists():
        raise QuantizeError(f"{out} already holds a model that this command did not write; choose another folder")


def _meta(job: Job) -> dict[str, Any]:
    return {
        "kind": "ternary",
        "version": 1,
        "job": job.id,
        "complete": False,
        "family": job.family.name,
        "parents": job.identity,
        "recipe": recipe_dict(job.recipe),
        "prompts": job.prompts.describe() if job.prompts else None,
        "seed": job.recipe.calibration.seed,
        "linears": len(job.linears),
        "weights": sum(n * k for n, k in job.linears.values()),
        "skipped": job.skipped,
        **provenance(job.device),
    }


def _report(out: Path, job: Job, meta: dict[str, Any], resumed: bool = False) -> QuantizeReport:
    return QuantizeReport(
        transformer=out / "transformer",
        linears=len(job.linears),
        weights=meta["weights"],
        skipped=job.skipped,
        digest=meta["digest"],
        components=meta["components"],
        validation={int(step): mse for step, mse in meta["validation_mse"].items()},
        resumed=resumed,
        retreats=meta.get("retreats", []),
    )
