"""`tritflow bench detector`: how well the scenes detector reads true pictures, before and after the VAE."""

from __future__ import annotations

from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Note, Results, store
from tritflow.cli.console import print_json, progress

_DETECTOR = """Examples:

\b
  tritflow bench detector --per-tag 1000 --results benchmarks/results
  tritflow bench detector --model OUT --device cuda    # through this pipeline's VAE
"""


@app.command(epilog=_DETECTOR)
def detector(
    model: Annotated[str, typer.Option("--model", "-m", help="A pipeline whose VAE makes the round trip.")] = "small",
    per_tag: Annotated[int, typer.Option("--per-tag", min=1, help="Held-out prompts a tag.")] = 200,
    size: Annotated[int, typer.Option(min=16, help="Height and width of the pictures.")] = 128,
    seed: Annotated[int, typer.Option(help="Of prompts and scenes.")] = 0,
    device: Device = "cpu",
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Render held-out scenes, read them back, and read them again after the VAE's encoder and decoder.

    The scenes suite is only as good as its detector: a true render that it misreads costs every model a point.
    """
    from tritflow.evaluation.tasks.detector import read_back, summary, vae_round_trip
    from tritflow.results import portable

    round_trip, on = vae_round_trip(model, device)
    with progress("reading", shown=not json) as update:
        run = read_back(per_tag, size, round_trip, seed=seed, device=on, progress=update)
    run |= {"model": portable(model), "note": note}
    store(results, "detector", [run])
    if json:
        print_json(run)
    else:
        print(summary(run))
