"""From a dense source to a learned ternary student: record the teacher, compensate, reconstruct, distil. Each stage
resumes.

Up to distillation the dense transformer is never whole in memory: its blocks are read from the source when they run.

.work/trajectories/   what the teacher did
.work/ranges.safetensors   how large its activations are, for smoothing
.work/compensated/    roundings, a file a block
.work/reconstructed/  the same after block reconstruction, with what each window gained in curve.json
.work/distilled/      checkpoint and loss curve
.work/student/        roundings as distilled
.work/rest.safetensors   dense parameters as distilled, where the recipe trains them
.work/latents.safetensors   latent weights as distilled, where they are to be kept
.work/calibration_records.jsonl   which recorded pairs compensation and reconstruction used
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tritflow.calibration.artifacts import file_sha256, read_json, write_json, write_tensors
from tritflow.calibration.ranges import InputRange, input_ranges, read_ranges, write_ranges
from tritflow.calibration.trajectories import Trajectories
from tritflow.config import TernaryConfig
from tritflow.distillation.blocks import Blocks
from tritflow.distillation.compensation import compensate_blocks, restore_
from tritflow.distillation.compilation import compile_blocks_, uncompile_
from tritflow.distillation.features import tapped, with_features
from tritflow.distillation.losses import measure_of
from tritflow.distillation.offload import OffloadedLatents
from tritflow.distillation.parameters import latent_dtype, parameter_groups, rest_parameters
from tritflow.distillation.reconstruction import reconstruct_blocks
from tritflow.distillation.sharded import Ranks, gathered, shard_, whole
from tritflow.distillation.shelf import Shelf
from tritflow.distillation.step import training_attention
from tritflow.distillation.velocity import DistillationResult, distill_
from tritflow.formats.repacking import LATENTS
from tritflow.models.flux1_training import training_forward
from tritflow.modules.fake import FakeTernaryLinear
from tritflow.pipelines.demands import replicated
from tritflow.pipelines.dense import streamed_teacher, whole_transformer
from tritflow.pipelines.online import online_states
from tritflow.pipelines.records import RECORDS, Records
from tritflow.pipelines.start import Start, pack_latent
from tritflow.pipelines.teacher import record_trajectories
from tritflow.quantization.convert import prepare_, twin_rounding
from tritflow.quantization.rounding import Rounded, round_weight
from tritflow.quantization.smoothing import smoothing_scale
from tritflow.quantization.store import RoundedStore

if TYPE_CHECKING:
    from tritflow.pipelines.quantize import Progress
    from tritflow.pipelines.quantize_job import Job

REST = "rest.safetensors"


@dataclass(frozen=True)
class Learned:
    """What the stages gave.

    Attributes:
        rounded: rounding of a linear by name.
        validation: step -> velocity MSE on held-out trajectories.
        rest: parameters by name that belong to no ternary linear, where they were trained.
        retreats: see `DistillationResult`.
    """

    rounded: Callable[[str], Rounded]
    validation: dict[int, float]
    rest: Mapping[str, Tensor] = field(default_factory=dict)
    retreats: list[dict[str, Any]] = field(default_factory=list)


def learn(job: Job, work: Path, progress: Progress) -> Learned:
    """Run the stages of a recipe that needs the teacher. `work` keeps what is finished.

    Several processes record and distil together, the first one does what is between; all call this.
    """
    summary = work / "learned.json"
    ranks = Ranks.here()
    done = read_json(summary) if summary.is_file() else {}
    if ranks.agree(done.get("job") != job.id):
        validation, retreats = _learn(job, work, progress, ranks)
        done = {"job": job.id, "validation": {str(k): v for k, v in validation.items()}, "retreats": retreats}
        if ranks.first:
            write_json(summary, done)
    else:
        validation = {int(k): v for k, v in done["validation"].items()}
    final = RoundedStore(work / _last_stage(job), job.id)
    rest = load_file(work / REST) if _tunes_rest(job) and (work / REST).is_file() else {}
    ranks.wait()  # the first goes on, and clears up in the end
    return Learned(lambda name: final[name], validation, rest, done.get("retreats", []))


def _learn(job: Job, work: Path, progress: Progress, ranks: Ranks) -> tuple[dict[int, float], list[dict[str, Any]]]:
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    _calibrate(job, work, dtype, progress, ranks)
    ranks.wait()
    if not job.recipe.distillation.steps:
        return {}, []
    start = RoundedStore(work / ("reconstructed" if job.recipe.reconstruction.steps else "compensated"), job.id)
    model = _student(job, job.start or start, dtype)
    return _distill(job, model, Trajectories(work / "trajectories"), work, progress)


def _tunes_rest(job: Job) -> bool:
    """Whether dense parameters end up other than the source's."""
    return job.recipe.distillation.rest_learning_rate > 0 or job.start is not None


def _calibrate(job: Job, work: Path, dtype: torch.dtype, progress: Progress, ranks: Ranks) -> None:
    """All that needs one dense block at a time: recording by all processes, the rest by the first one."""
    with streamed_teacher(job, dtype) as (blocks, pipe):
        assert job.prompts is not None
        trajectories = record_trajectories(
            pipe,
            job.prompts,
            work / "trajectories",
            job.recipe.calibration,
            parents={"source": job.source.fingerprint()},
            ranks=ranks,
            on_progress=lambda done, total: progress("record", done, total),
        )
        del pipe  # text encoders and VAE are not needed any more
        if not ranks.first:
            return
        records = Records(job, trajectories, work / RECORDS)
        shelf = Shelf.of(job.recipe.streaming, work / "streams")
        compensated = RoundedStore(work / "compensated", job.id)
        ranges = None
        if job.recipe.smoothing is not None:
            ranges = _ranges(job, blocks, trajectories, work / "ranges.safetensors", progress)
        if job.recipe.compensation:
            _compensate(job, blocks, trajectories, compensated, ranges, shelf, records, progress)
        elif ranges is not None:
            _round_smoothed(job, compensated, ranges)
        if job.recipe.reconstruction.steps:
            store = RoundedStore(work / "reconstructed", job.id)
            _reconstruct(job, blocks, trajectories, compensated, store, shelf, records, progress)


def _last_stage(job: Job) -> str:
    """The folder whose roundings are the result."""
    if job.recipe.distillation.steps:
        return "student"
    return "reconstructed" if job.recipe.reconstruction.steps else "compensated"


def _ranges(
    job: Job, blocks: Blocks, trajectories: Trajectories, path: Path, progress: Progress
) -> dict[str, InputRange]:
    found = read_ranges(path, job.id)
    if found is None:
        found = input_ranges(
            blocks.model,
            blocks.run,
            list(job.linears),
            trajectories,
            samples=job.recipe.compensation_samples,
            batch_size=job.recipe.calibration.batch_size,
            device=job.device,
            on_progress=lambda done, total: progress("range", done, total),
        )
        write_ranges(path, found, job.id)
    return found


def _column_of(job: Job, ranges: dict[str, InputRange]) -> Callable[[str, Tensor], Tensor]:
    exponent = job.recipe.smoothing
    assert exponent is not None
    skipped = TernaryConfig(targets=job.recipe.smoothing_skip)

    def column_of(name: str, weight: Tensor) -> Tensor:
        if skipped.matches(name):
            return torch.ones(weight.shape[1], device=weight.device)
        return smoothing_scale(weight, ranges[name].amax, exponent, job.recipe.smoothing_outliers)

    return column_of


def _round_smoothed(job: Job, store: RoundedStore, ranges: dict[str, InputRange]) -> None:
    """Round every weight under its smoothing scales, inputs weighted by their mean square."""
    column_of = _column_of(job, ranges)
    for block in job.family.block_order(job.source.config):
        inside = {}
        for name in job.linears:
            if name.startswith(f"{block}.") and not store.has_group(block):
                weight = job.weight(name)
                importance = ranges[name].mean_square
                c = column_of(name, weight)
                inside[name] = round_weight(weight, input_importance=importance, input_scale=c)
        if inside:
            store.write(block, inside)


def _compensate(
    job: Job,
    blocks: Blocks,
    trajectories: Trajectories,
    store: RoundedStore,
    ranges: dict[str, InputRange] | None,
    shelf: Shelf,
    records: Records,
    progress: Progress,
) -> None:
    compensate_blocks(
        blocks,
        trajectories,
        store,
        weight_of=job.weight,
        samples=job.recipe.compensation_samples,
        batch_size=job.recipe.calibration.batch_size,
        column_scale=job.ternary.column_scale,
        column_of=None if ranges is None else _column_of(job, ranges),
        shelf=shelf,
        on_samples=lambda room, train: records.add("compensate", job.recipe.compensation_samples, room, train=train),
        on_progress=lambda done, total: progress("compensate", done, total),
    )


def _reconstruct(
    job: Job,
    blocks: Blocks,
    trajectories: Trajectories,
    compensated: RoundedStore,
    store: RoundedStore,
    shelf: Shelf,
    records: Records,
    progress: Progress,
) -> None:
    start: Mapping[str, Rounded] = compensated if len(compensated) else _Rounding(job)
    samples = job.recipe.reconstruction.samples
    reconstruct_blocks(
        blocks,
        trajectories,
        start,
        store,
        job.recipe.reconstruction,
        activation_dtype=job.ternary.activation_dtype,
        shelf=shelf,
        on_samples=lambda room, train, held: records.add("reconstruct", samples, room, train=train, holdout=held),
        on_progress=lambda done, total: progress("reconstruct", done, total),
    )


class _Rounding(Mapping[str, Rounded]):
    """Every linear rounded from its weight alone, when it is asked for."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __getitem__(self, name: str) -> Rounded:
        return self.job.rounded(name)

    def __contains__(self, name: object) -> bool:
        return name in self.job.linears  # without rounding it

    def __iter__(self) -> Iterator[str]:
        return iter(self.job.linears)

    def __len__(self) -> int:
        return len(self.job.linears)


def _student(job: Job, start: RoundedStore | Start, dtype: torch.dtype) -> Any:
    """The student that distillation begins with, on the job's device: training twins in the place of linears."""
    config, offloaded = job.recipe.distillation, job.recipe.streaming.latent_store == "ram"
    # Where latent weights are offloaded the dense ones pass the device one by one.
    model = whole_transformer(job, dtype, linears=config.learning_rate > 0 and not offloaded)
    if not config.lean:
        model.float()
    # Where trits stand still the model holds no dense weights that could be rounded.
    rounded: Mapping[str, Rounded] = start if len(start) or config.learning_rate else _Rounding(job)
    if config.learning_rate and len(start) and not offloaded:
        restore_(model, list(job.linears), job.weight)
    prepare_(
        model,
        job.ternary,
        ternarizer=job.recipe.ternarizer,
        rounded=rounded,
        activation_bits=config.activation_bits,
        latent_dtype=latent_dtype(config),
        device=job.device,
        latent_device=torch.device("cpu") if offloaded else None,
        weight_of=job.weight if offloaded else None,
    )
    if config.lean:
        for _, parameter in rest_parameters(model):
            parameter.data = parameter.data.float()
        model.enable_gradient_checkpointing()
    if isinstance(start, Start):
        twins = {n: m for n, m in model.named_modules() if isinstance(m, FakeTernaryLinear) and m.moves}
        start.fill_(dict(rest_parameters(model)), {n: m.weight for n, m in twins.items()})
    return model


def _distill(
    job: Job, model: Any, trajectories: Trajectories, work: Path, progress: Progress
) -> tuple[dict[int, float], list[dict[str, Any]]]:
    config, ranks = job.recipe.distillation, Ranks.here()
    order = job.family.block_order(job.source.config)
    whole_here = replicated(job.recipe)
    if not whole_here:
        shard_(model, order, job.device)
    states, teacher = online_states(job) if job.recipe.online.pool else (None, None)
    measure, groups = measure_of(config, _token_grid(trajectories, job)), parameter_groups(model, config)
    with training_attention(job.device), ExitStack() as taps:
        offload = None
        if job.recipe.streaming.latent_store == "ram":
            offload = taps.enter_context(OffloadedLatents(model, order, job.device))
        if config.feature_weight and teacher is not None:
            # The last block's states are the velocity, but for those of the text, which nothing reads any more.
            seen, wanted = (taps.enter_context(tapped(m, order[:-1])) for m in (model, teacher))
            measure = with_features(measure, seen, wanted, config.feature_weight)
        train = functools.partial(
            distill_,
            lambda **kwargs: model(**kwargs, return_dict=False)[0],
            groups,
            trajectories,
            config,
            work / "distilled",
            states=states,
            offload=offload,
            measure=measure,
            device=job.device,
            identity={"job": job.id, "trajectories": file_sha256(work / "trajectories" / "meta.json")},
            on_progress=lambda done, total, loss: progress("distill", done, total),
        )
        models = [model, *([] if teacher is None else [teacher])]
        if whole_here:
            taps.enter_context(training_forward(*models))
        if config.compile_blocks and job.device.type == "cuda" and (whole_here or ranks.world == 1):
            result = _compiled(models, train)
        else:
            result = train()
    rest = {n: whole(p).detach() for n, p in rest_parameters(model)} if _tunes_rest(job) else {}
    if rest and ranks.first:
        write_tensors(work / REST, rest, {"job": job.id})
    store = RoundedStore(work / "student", job.id)
    latents: dict[str, Tensor] = {}
    for block in order:
        with gathered(model.get_submodule(block)) as module:
            twins = {n: m for n, m in module.named_modules() if isinstance(m, FakeTernaryLinear)}
            if twins and ranks.first:
                store.write(block, {f"{block}.{n}": twin_rounding(m) for n, m in twins.items()})
                if job.keep_latents:
                    latents |= {f"{block}.{n}": pack_latent(m.weight.float()).cpu() for n, m in twins.items()}
    if latents:
        write_tensors(work / LATENTS, latents, {"job": job.id})
    return result.validation, result.retreats


def _token_grid(trajectories: Trajectories, job: Job) -> tuple[int, int]:
    """Rows and columns of image tokens in what was recorded."""
    ids = trajectories.pairs(torch.zeros(1, dtype=torch.long), "all", job.device).kwargs["img_ids"]
    return int(ids[..., 1].max()) + 1, int(ids[..., 2].max()) + 1


def _compiled(models: list[Any], train: Callable[[], DistillationResult]) -> DistillationResult:
    """`train` with the models' blocks compiled; without, where this machine's compiler fails (it needs a C compiler).

    Nothing is lost then: compilation fails before the first step.
    """
    from torch._dynamo.exc import TorchDynamoException

    for model in models:
        compile_blocks_(model)
    try:
        return train()
    except TorchDynamoException as error:
        warnings.warn(f"the blocks could not be compiled and train slower ({str(error).splitlines()[0]})", stacklevel=2)
        _uncompile(models)
        return train()
    finally:
        _uncompile(models)


def _uncompile(models: list[Any]) -> None:
    for model in models:
        uncompile_(model)
