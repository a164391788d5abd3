"""What is left to do, in pictures, disk and time: projected from what lies there, unknown where nothing is."""

from __future__ import annotations

import functools
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tritflow.config import Recipe
from tritflow.evaluation.images import ImageSetError, read_meta
from tritflow.evaluation.projection import project
from tritflow.recipes import load_recipe
from tritflow.reproduction.engine import Cost
from tritflow.reproduction.request import Request


def job_of(request: Request) -> Any:
    """The quantization as it will be done, from headers alone; see `pipelines.quantize_job.plan`."""
    return _job(request.model, load_recipe(request.recipe), request.calibration or request.prompts, request.device)


@functools.lru_cache(maxsize=4)
def _job(model: str, recipe: Recipe, prompts: str | Path | None, device: str | None) -> Any:
    from tritflow.pipelines.quantize_job import plan

    # A model that brings calibration prompts of its own is calibrated on those, whatever the suites are.
    own = model == "small" or (Path(model) / "calibration_prompts.txt").is_file()
    given = None if own and isinstance(prompts, Path) else prompts
    return plan(model, recipe, prompts=given, device=device)


def of_quantizing(request: Request, fresh: bool) -> Cost:
    from tritflow.formats.accounting import storage_estimate
    from tritflow.pipelines.demands import needs_teacher

    job = job_of(request)
    size = storage_estimate(job.source.shapes(), job.ternary.packing, job.ternary).total
    note = "without the recipe's work files" if needs_teacher(job.recipe) else ""
    return Cost(bytes=size, seconds=None, note=note)


def of_drawing(request: Request, suite: str, who: str, fresh: bool) -> Cost:
    """From the pictures that are there; the pace may come from another run's folder of the same contender."""
    task = request.task(suite)
    teacher = request.teacher()
    by = request.drawn_by(who) if who == "teacher" or _made(request) else None
    total = len(request.records(task)) * request.sampling(task).samples
    place = request.pictures(task)
    # A student that is not made yet draws pictures of its teacher's size.
    name = by.folder_name if by else "not made yet"
    found = project(place / name, name, total, (by or teacher).settings, earlier=False)
    left = total if fresh else found.pictures - found.present
    needed = found.bytes_needed
    if fresh:
        needed = project(place / "afresh", name, total, teacher.settings, earlier=False).bytes_needed
    seconds = 0.0 if not left else None if fresh else found.seconds
    if seconds is None and by is not None:
        paces = [_pace(folder, by.settings) for folder in sorted(place.parent.glob(f"{suite}-*/{name}"))]
        known = [p for p in paces if p is not None]
        seconds = known[-1] * left if known else None
    return Cost(left, needed, seconds)


def _pace(folder: Path, settings: Any) -> float | None:
    """Seconds a picture in another folder of pictures that were drawn alike."""
    try:
        meta = read_meta(folder)
    except ImageSetError:
        return None
    if meta["settings"] != asdict(settings):
        return None
    there = project(folder, "", 0, settings, earlier=False).present
    return project(folder, "", there + 1, settings, earlier=False).seconds


def of_scoring(request: Request, suite: str, who: str, fresh: bool) -> Cost:
    """Suites that load no model score in no time worth telling."""
    return Cost(seconds=None if request.task(suite).roles else 0.0)


def of_timing(request: Request, fresh: bool) -> Cost:
    return Cost(seconds=None)


def _made(request: Request) -> bool:
    from tritflow.calibration.artifacts import read_json

    meta = request.student / "meta.json"
    return meta.is_file() and bool(read_json(meta).get("complete"))
