"""`tritflow bench suites|scorers`: what evaluating costs beside the model, and how fast scorers look at pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Note, Results, store
from tritflow.cli.console import print_json, progress

_SUITES = """Examples:

\b
  tritflow bench suites                                  # GenEval's 2,212 pictures at 1024x1024: minutes, 5 GB of disk
  tritflow bench suites t2i-compbench --size 128         # 24,000 pictures
"""


@app.command(epilog=_SUITES)
def suites(
    suite: Annotated[str, typer.Argument(help="geneval, t2i-compbench or scenes.")] = "geneval",
    prompts: Annotated[Path | None, typer.Option(help="Folder of the suite's prompt files.")] = None,
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    samples: Annotated[int | None, typer.Option("--seeds-per-prompt", min=1, help="Default: the suite's own.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at once.")] = 16,
    workdir: Annotated[
        Path | None, typer.Option("--workdir", help="Where the pictures lie meanwhile (default: temporary).")
    ] = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Milliseconds a picture that a suite costs beyond drawing and PNG encoding, with a stand-in pipeline."""
    from tritflow.evaluation import overhead

    with progress("drawing", shown=not json) as update:
        run = overhead.measure(
            suite,
            prompts=prompts,
            size=size,
            samples=samples,
            batch_size=batch_size,
            workdir=workdir,
            progress=update,
        )
    run["note"] = note
    store(results, "suites", [run])
    if json:
        print_json(run)
    else:
        print(overhead.table(run))


_SCORERS = """Examples:

\b
  tritflow bench scorers --device cuda --results benchmarks/results   # about four minutes
  tritflow bench scorers --scorer mask2former --pictures 16 --size 512
"""


@app.command(epilog=_SCORERS)
def scorers(
    device: Device = "cpu",
    scorer: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many are scored.")] = 256,
    size: Annotated[int, typer.Option(min=32, help="Of the pictures, in pixels.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at once.")] = 8,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Pictures a second of the suites' scorers: real architectures, random weights, PNGs read meanwhile."""
    from tritflow.evaluation import throughput
    from tritflow.pipelines.loading import pick_device

    on = str(pick_device(device))
    measured = []
    for run in throughput.measure(scorer or (), device=on, pictures=pictures, size=size, batch_size=batch_size):
        run["note"] = note
        measured.append(run)
        store(results, "scorers", [run])
        if not json:
            print(throughput.line(run), flush=True)
    if json:
        print_json(measured)
