"""The whole job behind `tritflow quantize`: a dense FLUX checkpoint in, a ternary model folder out.

Recipes without calibration stream: a tensor is read, rounded, packed and written before the next is touched. The
others record the teacher, compensate and distil in `OUT/.work`, then write through the same writer. Every stage
keeps what it finished, so the same command after a kill goes on, and ends in the same bytes.
"""

from __future__ import annotations

import filecmp
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tritflow.calibration.artifacts import provenance, read_json, write_bytes, write_json
from tritflow.calibration.prompts import PromptSet
from tritflow.config import Packing, Recipe
from tritflow.distillation.sharded import Ranks, processes
from tritflow.formats.atomic import atomic_file
from tritflow.formats.repacking import LATENTS
from tritflow.formats.writer import TransformerWriter
from tritflow.pipelines.demands import QuantizeError as QuantizeError
from tritflow.pipelines.demands import check_disk, needs_teacher
from tritflow.pipelines.quantize_job import Job as Job
from tritflow.pipelines.quantize_job import plan as plan
from tritflow.pipelines.records import RECORDS
from tritflow.pipelines.start import write_latents
from tritflow.quantization.rounding import Rounded
from tritflow.recipes import DEFAULT, recipe_dict

WORK = ".work"
COMPONENTS_LIMIT = 1 << 30
_COPIED = {".json", ".txt", ".model", ".safetensors", ".md", ".jinja"}

Progress = Callable[[str, int, int], None]
"""Called as (stage, done, total). Stages: `round`, `record`, `range`, `compensate`, `reconstruct`, `distill`, `write`,
`copy`."""


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
    work = out / WORK
    if not _learned(work, job):
        check_disk(job.recipe, job.weights, work)
    write_json(out / "meta.json", meta)
    validation: dict[int, float] = {}
    rest: Mapping[str, Tensor] = {}
    retreats: list[dict[str, Any]] = []
    if ranks.agree(needs_teacher(job.recipe)):
        from tritflow.pipelines.student import learn

        learned = learn(job, work, progress)
        validation, rounded, rest, stage = learned.validation, learned.rounded, learned.rest, "write"
        retreats = learned.retreats
    else:
        rounded, stage = job.rounded, "round"
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
    return bool(previous and previous["complete"]) or (_learned(work, job) and not (work / LATENTS).is_file())


def _learned(work: Path, job: Job) -> bool:
    path = work / "learned.json"
    return path.is_file() and read_json(path).get("job") == job.id


def _write(
    job: Job,
    folder: Path,
    rounded: Callable[[str], Rounded],
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
            q = rounded(module)
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
        "weights": job.weights,
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
