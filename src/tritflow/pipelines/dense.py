"""The dense teacher behind a job: whole, or with blocks that are read from the source when they run."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from tritflow.distillation.blocks import Blocks
from tritflow.pipelines.loading import ModelError, resolve_model

if TYPE_CHECKING:
    from tritflow.pipelines.quantize_job import Job

from tritflow.formats.source import Source
from tritflow.models.family import Family
from tritflow.modules.streamed import StreamedBlocks


@contextmanager
def streamed_teacher(job: Job, dtype: torch.dtype) -> Iterator[tuple[Blocks, Any]]:
    """The teacher's blocks, and a stock pipeline that runs them, on the job's device.

    Raises:
        ModelError: the family's blocks cannot be run one by one, or no pipeline gives text encoders.
    """
    blocks = streamed_blocks(
        job.source, job.family, list(job.linears), job.device, dtype, job.recipe.streaming.cache_bytes
    )
    try:
        yield blocks, _pipeline(job, blocks.model, dtype)
    finally:
        blocks.dense.close()


def streamed_blocks(
    source: Source, family: Family, linears: list[str], device: torch.device, dtype: torch.dtype, keep_bytes: int = 0
) -> Blocks:
    """A stock transformer of which only embedders and output layer are read; blocks come from `source` when they run.

    Args:
        linears: those that become ternary.
        keep_bytes: see `StreamedBlocks`.

    Raises:
        ModelError: the family's blocks do not call each other alike.
    """
    if family.block_calls is None:
        raise ModelError(f"{family.name} cannot be run block by block: its blocks do not call each other alike")
    model, order = _empty(source, family), family.block_order(source.config)
    inside = tuple(f"{name}." for name in order)
    _fill_(model, source, [n for n in source.names() if not n.startswith(inside)], device, dtype)
    read = functools.partial(source.tensor, device=device)
    streamed = StreamedBlocks(model, order, read, device=device, dtype=dtype, keep_bytes=keep_bytes)
    return Blocks(streamed, lambda **kwargs: model(**kwargs, return_dict=False), linears, family.block_calls)


def whole_teacher(job: Job) -> Any:
    """The teacher as a stock pipeline, its transformer read whole from the job's own source."""
    dtype = torch.bfloat16 if job.device.type == "cuda" else torch.float32
    return _pipeline(job, whole_transformer(job, dtype), dtype)


def whole_transformer(job: Job, dtype: torch.dtype, *, linears: bool = True) -> Any:
    """A stock model filled tensor by tensor, whatever the source looks like on disk.

    Without `linears` the weights of those that become ternary stay on the meta device.
    """
    model = _empty(job.source, job.family)
    left = () if linears else {f"{name}.weight" for name in job.linears}
    _fill_(model, job.source, [name for name in job.source.names() if name not in left], job.device, dtype)
    return model


def _empty(source: Source, family: Family) -> Any:
    import diffusers

    cls: Any = getattr(diffusers, family.transformer_class)
    with torch.device("meta"):
        model = cls.from_config({k: v for k, v in source.config.items() if not k.startswith("_")})
    return model.requires_grad_(False).eval()


def _fill_(model: nn.Module, source: Source, names: list[str], device: torch.device, dtype: torch.dtype) -> None:
    state = {name: source.tensor(name, device).to(dtype) for name in names}
    model.load_state_dict(state, assign=True, strict=False)  # the source's names were checked against the family
    model.requires_grad_(False)


def _pipeline(job: Job, transformer: Any, dtype: torch.dtype) -> Any:
    from diffusers import FluxPipeline

    folder: str | Path | None = job.location.pipeline
    if folder is None:
        if job.base is None:
            raise ModelError(
                f"recipe '{job.recipe.name}' runs the teacher, and {job.source.path} is a bare transformer: name the "
                "pipeline with its text encoders by --base FLUX_DIR, or take --recipe fast, which needs none"
            )
        folder = resolve_model(job.base).pipeline
    pipe: Any = FluxPipeline.from_pretrained(folder, transformer=transformer, torch_dtype=dtype, use_safetensors=True)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, nn.Module) and component is not transformer:
            component.to(job.device)  # the transformer is there already, as far as it is there at all
    return pipe
