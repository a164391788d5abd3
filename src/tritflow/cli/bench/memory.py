"""`tritflow bench memory`: a whole pipeline within a budget of GPU memory."""

from __future__ import annotations

from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Json, Note, Results, store
from tritflow.cli.console import print_json

_MEMORY = """Examples:

\b
  tritflow bench memory --budget 5.3GiB                    # FLUX.1-dev's configs, random weights, 13 GB of host memory
  tritflow bench memory OUT --base FLUX_DIR --budget 6GiB --results benchmarks/results
"""


@app.command(epilog=_MEMORY)
def memory(
    model: Annotated[
        str | None, typer.Argument(help="Folder or hub id (default: FLUX.1-dev's configs, random weights).")
    ] = None,
    budget: Annotated[str, typer.Option(help="GPU memory, all included.")] = "5.3GiB",
    base: Annotated[str | None, typer.Option(help="Pipeline that completes a bare ternary transformer.")] = None,
    mode: Annotated[str | None, typer.Option(help="w2a16 or w2a8 (default: the folder's).")] = None,
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler; memory does not depend on it.")] = 4,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Draw pictures within a budget of GPU memory, and read from the driver what was used."""
    from tritflow.profiling import memory as bench

    run = bench.measure(
        budget, model=model, base=base, device="cuda", mode=mode, size=size, num_inference_steps=steps, note=note
    )
    store(results, "memory", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))
