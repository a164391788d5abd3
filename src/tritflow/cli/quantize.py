"""`tritflow quantize`: a dense FLUX checkpoint becomes a ternary one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli import options as o
from tritflow.cli.console import print_json, say

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow quantize FLUX_DIR OUT                       # rounds only: streams at any size, breaks pictures
  tritflow quantize finetune-fp8.safetensors OUT       # one file with Black Forest Labs' names
  tritflow quantize small OUT --recipe demo            # compensate and distil the built-in model
  tritflow quantize FLUX_DIR OUT --recipe balanced --prompts my_prompts.txt --device cuda
  torchrun --nproc-per-node 2 -m tritflow.cli.main quantize FLUX_DIR OUT --recipe best   # distils on two GPUs
  tritflow quantize small OUT --recipe best --prompts scenes:49152 --keep-latents
  tritflow quantize small OUT2 --recipe best --prompts scenes:49152 --start OUT    # another leg
  tritflow quantize small OUT3 --recipe best --prompts scenes:49152 --seed 1       # the same with other noise
  tritflow quantize --list                             # the recipes
"""

_STAGES = {
    "round": "rounding",
    "record": "recording the teacher",
    "range": "measuring activations",
    "compensate": "compensating",
    "reconstruct": "reconstructing blocks",
    "distill": "distilling",
    "write": "writing",
    "copy": "copying the other components",
}


def _list(value: bool) -> None:
    if value:
        from tritflow.recipes import load_recipe, recipe_names

        for name in recipe_names():
            typer.echo(f"{name:16} {load_recipe(name).summary}")
        raise typer.Exit


@app.command(epilog=_EXAMPLES)
def quantize(
    source: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A diffusers folder, a hub id, one safetensors file, or `small`."),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write; an unfinished job resumes.")],
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="A recipe's name (see --list), or a .toml file. The default only rounds."),
    ] = "fast",
    mode: Annotated[
        str | None,
        typer.Option("--mode", help="w2a16, or w2a8 for 8-bit activations; default: the recipe's."),
    ] = None,
    packing: Annotated[
        str | None, typer.Option("--packing", help="2bit, or base3 (five trits a byte, smaller on disk).")
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option("--skip", help="Pattern of block linears to keep dense, such as '*.norm1.linear'; repeatable."),
    ] = None,
    column_scale: Annotated[
        bool | None, typer.Option("--column-scale/--no-column-scale", help="Also store one scale a column.")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option("--prompts", help="Calibration prompts: .txt, .jsonl, a folder, or scenes:N. No images needed."),
    ] = None,
    base: o.Base = None,
    device: o.Device = "auto",
    seed: Annotated[
        int | None, typer.Option(help="Of calibration's noise and prompts and of training's order: a second run.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="TABLE.KEY=VALUE", help="Change a setting of the recipe; repeatable."),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Distil on from this finished student (OUT of an earlier run, small-student).")
    ] = None,
    keep_latents: Annotated[
        bool, typer.Option("--keep-latents", help="Also write what a later --start goes on from: a byte a weight.")
    ] = False,
    full: Annotated[bool, typer.Option("--full", help="Copy the other components too, even above 1 GiB.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in OUT.")] = False,
    keep_work: Annotated[
        bool, typer.Option("--keep-work", help="Keep trajectories and checkpoints in OUT/.work.")
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", callback=_list, is_eager=True, help="List the recipes and stop.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Turn every block linear of a FLUX transformer into {-1, 0, +1}; killed or interrupted, it resumes."""
    from tritflow.pipelines.loading import quiet
    from tritflow.pipelines.quantize import quantize as run
    from tritflow.recipes import advice

    speaks = os.environ.get("RANK", "0") == "0"  # of several processes (torchrun), the first
    with quiet(), _bars(speaks and not json) as update:
        report = run(
            source,
            out,
            recipe,
            mode=mode,
            packing=packing,
            skip=skip or (),
            column_scale=column_scale,
            prompts=prompts,
            base=base,
            device=device,
            seed=seed,
            settings=settings or (),
            start=start,
            keep_latents=keep_latents,
            full=full,
            overwrite=overwrite,
            keep_work=keep_work,
            on_progress=update,
        )
    if not speaks:
        return
    hint = advice(recipe, report.weights)
    size = sum(p.stat().st_size for p in report.transformer.glob("*.safetensors"))
    if json:
        print_json(
            {
                "transformer": str(report.transformer),
                "recipe": recipe,
                "linears": report.linears,
                "weights": report.weights,
                "skipped": report.skipped,
                "bytes": size,
                "digest": report.digest,
                "components": report.components,
                "note": hint,
                "retreats": list(report.retreats),
                "validation_mse": {str(k): v for k, v in report.validation.items()},
            }
        )
        return
    if report.resumed:
        say("it was finished already; nothing to do")
    print(
        f"{report.transformer}: {report.linears} ternary linears, {report.weights / 1e6:,.1f} M weights, "
        f"{size / 1e6:,.2f} MB"
    )
    if report.skipped:
        say(f"{report.skipped} block linears stayed dense (skip)")
    if report.validation:
        first, last = (report.validation[k] for k in (min(report.validation), max(report.validation)))
        say(f"velocity error on held-out trajectories: {first:.5g} -> {last:.5g}")
    for retreat in report.retreats:
        then = "its best so far is what was written" if retreat["last"] else "it went on from there at half the rate"
        say(f"diverged at step {retreat['at']} ({retreat['why']}), back to step {retreat['to']}: {then}")
    if hint:
        say(f"note: {hint}")
    if not report.components:
        say(
            "text encoders and VAE were not copied (--full copies large ones); the pipeline folder is taken from "
            "meta.json, or named with --base"
        )


@contextmanager
def _bars(shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    """One bar a stage; yields `update(stage, done, total)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not (shown and console.is_terminal)) as progress:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(_STAGES.get(stage, stage), total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield update
