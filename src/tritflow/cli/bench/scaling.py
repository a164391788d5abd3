"""`tritflow bench scaling`: what a student keeps against size and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Results, store, whole_numbers
from tritflow.cli.console import print_json, say

_SCALING = """Examples:

\b
  tritflow bench scaling --out runs/scaling --device cuda --results benchmarks/results
  tritflow bench scaling --out runs/scaling --device cuda --sizes 2M,5M --steps 500,2000    # a part; resumes
"""


@app.command(epilog=_SCALING)
def scaling(
    out: Annotated[Path, typer.Option(help="Keeps every stage; the same command goes on after a kill.")],
    sizes: Annotated[str, typer.Option(help="Of 2M, 5M, 14M and 40M, joined by commas.")] = "2M,5M,14M,40M",
    steps: Annotated[str, typer.Option(help="Of distillation, joined by commas.")] = "500,2000,8000",
    seconds: Annotated[float, typer.Option(min=1, help="Of training each teacher.")] = 300.0,
    recipe: Annotated[str, typer.Option(help="Of the students; its steps are overridden.")] = "best",
    mode: Annotated[str | None, typer.Option(help="w2a16 or w2a8 (default: the recipe's).")] = None,
    per_tag: Annotated[int, typer.Option(min=1, help="Held-out prompts a tag, a picture each.")] = 128,
    prompts: Annotated[str, typer.Option(help="That students are distilled on.")] = "scenes:49152",
    seed: Annotated[int, typer.Option(help="Of teachers, students and noise.")] = 0,
    device: Device = "cpu",
    results: Results = None,
    json: Json = False,
) -> None:
    """Train teachers of several sizes, distil each at several lengths, and tell what is kept."""
    from tritflow.config import ConfigError
    from tritflow.pipelines.loading import pick_device, quiet
    from tritflow.report.formats import FORMATS
    from tritflow.reproduction.scaling import scale
    from tritflow.training.sized import SIZES

    percent, decibel = FORMATS["percent"], FORMATS["dB"]
    names = [name.strip() for name in sizes.split(",")]
    unknown = next((name for name in names if name not in SIZES), None)
    if unknown is not None:
        raise ConfigError(f"there is no size '{unknown}' (there are: {', '.join(SIZES)})")
    counts = whole_numbers("--steps", steps)
    on = str(pick_device(device))
    chosen = {name: SIZES[name] for name in names}
    with quiet():
        runs = []
        for run in scale(
            chosen, counts, out, recipe=recipe, seconds=seconds, per_tag=per_tag, prompts=prompts, device=on,
            mode=mode, seed=seed, say=say,
        ):  # fmt: skip
            runs.append(run)
            say(f"{run['label']}: {percent(run['paired']['overall'].get('kept'))} kept, {decibel(run['psnr'])} dB")
            store(results, "scaling", [run])
    if json:
        print_json(runs)
