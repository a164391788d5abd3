"""`tritflow bench quantization`: what quantizing a large model costs, from blocks of its size."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Note, Results, store
from tritflow.cli.console import print_json, progress

_QUANTIZATION = """Examples:

\b
  tritflow bench quantization --device cuda --results benchmarks/results   # FLUX.1-dev's blocks: 2 GB of disk
  tritflow bench quantization --like small --pixels 128 --text-tokens 64   # the small FLUX's, on this CPU
  tritflow bench quantization --stored --results benchmarks/results --recipe mine.toml   # hours; nothing is run
"""


@app.command(epilog=_QUANTIZATION)
def quantization(
    device: Device = "cpu",
    blocks: Annotated[str, typer.Option(help="Double + single blocks that are run.")] = "1+1",
    like: Annotated[
        str | None, typer.Option(help="A dense FLUX.1 folder or `small`, whose widths are taken (default: FLUX.1-dev).")
    ] = None,
    pixels: Annotated[int, typer.Option(min=16, help="Height and width of the pictures.")] = 1024,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Of each prompt.")] = 512,
    samples: Annotated[int, typer.Option(min=2, help="Recorded pairs that pass the blocks.")] = 8,
    batch_size: Annotated[int, typer.Option("--batch-size", min=2, help="Pairs at once.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Optimiser steps by which a window is timed.")] = 64,
    recipe: Annotated[
        list[str] | None, typer.Option("--recipe", help="Project this one; may be repeated (default: all).")
    ] = None,
    stored: Annotated[
        bool, typer.Option("--stored", help="Take the newest such measurement of a GPU from --results instead.")
    ] = False,
    workdir: Annotated[Path | None, typer.Option("--workdir", help="Where the random files lie meanwhile.")] = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time and peak memory of every stage on blocks of random weights, and the hours that recipes take from them."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import projection
    from tritflow.profiling import quantization as bench
    from tritflow.recipes import load_recipe, recipe_names
    from tritflow.results import provenance

    recipes = [load_recipe(r) for r in recipe or recipe_names()]
    config, name = bench.config_like(like)
    if stored:
        run = _stored(results, "quantization-cuda", name)[-1]
        now = provenance()
        run = {**run, "measured": run.get("measured", run["time"]), "time": now["time"], "projected_by": now["command"]}
    else:
        counts = blocks.split("+")
        if len(counts) != 2 or not all(c.isdigit() and int(c) for c in counts):
            raise typer.BadParameter(f"--blocks {blocks}: write double+single, such as 1+1")
        if samples < 2 * batch_size:
            raise typer.BadParameter(f"--samples {samples}: at least two batches of {batch_size}")
        with progress("measuring", shown=not json) as update:
            run = bench.measure(
                config,
                model=name,
                blocks=(int(counts[0]), int(counts[1])),
                device=str(pick_device(device)),
                pixels=pixels,
                text_tokens=text_tokens,
                samples=samples,
                batch_size=batch_size,
                steps=steps,
                workdir=workdir,
                progress=update,
            )
        run["note"] = note
    kind = "cuda" if run["peak_of"] == "GPU" else "cpu"
    whole = _stored(results, f"distillation-{kind}", name, missing_ok=True)
    run["projected"] = [
        projection.project(run, r, step_seconds=projection.measured_step(whole, run, r)) for r in recipes
    ]
    store(results, f"quantization-{kind}", [run])
    if json:
        print_json(run)
    else:
        print(projection.table(run, run["projected"]))


def _stored(folder: Path | None, topic: str, model: str, *, missing_ok: bool = False) -> list[dict[str, Any]]:
    """All runs of a topic on a model, oldest first."""
    from tritflow.config import ConfigError
    from tritflow.results import read

    files = sorted(folder.glob(f"{topic}-*.json")) if folder is not None else []
    found = (run for file in files for run in read(file, topic) if run["model"] == model)
    runs = sorted(found, key=lambda run: run["time"])
    if not runs and not missing_ok:
        raise ConfigError(
            f"--stored: no {topic} run of {model} in --results; measure on a GPU first, or name the right folder"
        )
    return runs
