"""`tritflow demo` (and `make demo`): the whole way in a few minutes, on the model inside the package.

Quantizes the built-in FLUX live, loads the result through stock diffusers, draws the same prompts from the same
noise with the teacher, the live result and the shipped student, and scores all three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli import options as o
from tritflow.cli.console import print_json, progress, say

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow demo
  tritflow demo --out runs/mine --recipe fast --per-tag 20
  tritflow demo --teacher FLUX_DIR --student none --recipe absmean
"""

_TABLE = """
[demo]
title = "Teacher, live-quantized and shipped student on the same noise"
topic = "scenes"
each = ["label"]
columns = [
  { name = "", value = "label" },
  { name = "single", value = "scores.tags.single_object", format = "point" },
  { name = "two", value = "scores.tags.two_object", format = "point" },
  { name = "counting", value = "scores.tags.counting", format = "point" },
  { name = "colors", value = "scores.tags.colors", format = "point" },
  { name = "position", value = "scores.tags.position", format = "point" },
  { name = "attribution", value = "scores.tags.color_attr", format = "point" },
  { name = "overall", value = "scores.overall", format = "score" },
  { name = "difference", value = "paired.overall.difference", format = "difference" },
  { name = "PSNR (dB)", value = "fidelity.psnr", format = "dB" },
]
note = "A few prompts a tag, so the intervals are wide: the README has the full tables."
"""


@app.command(epilog=_EXAMPLES)
def demo(
    out: o.Out = Path("runs/demo"),
    teacher: Annotated[str, typer.Option("--teacher", help="Pipeline folder that is quantized.")] = "small",
    student: Annotated[
        str, typer.Option("--student", help="A ternary model to show beside it, or none.")
    ] = "small-student",
    recipe: Annotated[
        str, typer.Option("--recipe", help="How the live model is made: a recipe's name or file.")
    ] = "demo",
    per_tag: Annotated[int, typer.Option("--per-tag", min=1, help="Scored prompts of each of GenEval's six tags.")] = 6,
    seed: o.Seed = 0,
    device: o.Device = "auto",
    json: o.Json = False,
) -> None:
    """Quantize the built-in FLUX live, draw with it and score it, beside its teacher and the shipped student.

    Leaves grid.png, table.md and results.json in OUT, in place of those of an earlier demo.
    """
    start = time.perf_counter()
    models = {"teacher": teacher, f"live ({recipe})": str(out / "live")}
    if student != "none":
        models["shipped student"] = student
    _forget(out)
    say(f"1/3 quantizing '{teacher}' with recipe '{recipe}'")
    with progress("quantizing", shown=not json) as update:
        _quantize(teacher, out / "live", recipe, device, lambda _, done, total: update(done, total))
    say("2/3 drawing the same prompts from the same noise")
    grid = _grid(models, out / "grid.png", seed, device)
    say(f"3/3 scoring {per_tag} held-out prompts a tag")
    with progress("scoring", shown=not json) as update:
        runs = _score(models, out, per_tag, seed, device, lambda _, done, total: update(done, total))
    table = _table(runs, out / "table.md")
    seconds = round(time.perf_counter() - start, 1)
    if json:
        files = {"grid": str(grid), "table": str(out / "table.md"), "results": str(out / "results.json")}
        print_json({"recipe": recipe, "runs": runs, "seconds": seconds, **files})
    else:
        print(table)
        print(f"{grid}\n{out / 'table.md'}\n{out / 'results.json'}")
        say(f"{seconds:.0f} s in all")


class DemoError(ValueError):
    """The output folder holds something that no demo wrote."""


def _forget(out: Path) -> None:
    """Remove what an earlier demo left in `out`, and nothing else."""
    import shutil

    if (out / "live").exists() and not (out / "live" / "meta.json").is_file():
        raise DemoError(f"{out / 'live'} was not made by a demo; give another folder: --out FOLDER")
    for name in ("live", "scores"):
        shutil.rmtree(out / name, ignore_errors=True)
    for name in ("grid.png", "table.md", "results.json"):
        (out / name).unlink(missing_ok=True)


def _quantize(source: str, out: Path, recipe: str, device: str, stage: Callable[[str, int, int], None]) -> None:
    from tritflow.pipelines.loading import quiet
    from tritflow.pipelines.quantize import quantize

    with quiet():
        quantize(source, out, recipe, device=device, on_progress=stage)


def _grid(models: dict[str, str], path: Path, seed: int, device: str) -> Path:
    from tritflow.pipelines.compare import compare
    from tritflow.pipelines.generate import save_pictures
    from tritflow.pipelines.loading import quiet
    from tritflow.scenes import evaluation_prompts

    prompts = [prompt.text for prompt in evaluation_prompts(1)]
    with quiet():
        result = compare(
            list(models.values()), prompts, seed, labels=list(models), base=models["teacher"], device=device
        )
    return save_pictures([result.grid()], path)[0]


def _score(
    models: dict[str, str],
    out: Path,
    per_tag: int,
    seed: int,
    device: str,
    stage: Callable[[str, int, int], None],
) -> list[dict[str, Any]]:
    """One run a model, each against the teacher, appended to results.json."""
    from tritflow.evaluation.api import get_task
    from tritflow.evaluation.contenders import contender, trained_prompts
    from tritflow.evaluation.run import Sampling, evaluate
    from tritflow.results import append
    from tritflow.scenes import GENEVAL_TAGS

    task = get_task("scenes")
    records = task.prompts(tags=GENEVAL_TAGS, per_tag=per_tag)  # those of the table
    sampling = Sampling(samples=1, base_seed=seed)
    reference = contender(models["teacher"], device=device)
    runs = []
    for label, model in models.items():
        dense = label == "teacher"
        run = evaluate(
            task,
            records,
            reference if dense else contender(model, base=models["teacher"], device=device),
            out / "scores",
            teacher=None if dense else reference,
            sampling=sampling,
            label=label,
            trained_on=trained_prompts(model),
            stage=stage,
        )
        runs.append(append(out / "results.json", "scenes", run))
    return runs


def _table(runs: list[dict[str, Any]], path: Path) -> str:
    from tritflow.formats.atomic import write_atomic
    from tritflow.report.tables import build, load_specs, markdown

    text = markdown(build(load_specs(_TABLE)["demo"], runs))
    write_atomic(path, (text + "\n").encode())
    return text
