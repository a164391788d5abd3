"""`tritflow bench lora`: what a loaded LoRA costs a step."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Json, Note, Results, store
from tritflow.cli.console import print_json, say

_LORA = """Examples:

\b
  tritflow bench lora                                     # a minute of one Hopper GPU
  tritflow bench lora --results benchmarks/results
"""


@app.command(epilog=_LORA)
def lora(
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    count: Annotated[int, typer.Option(min=1, help="Timed steps, with the adapter and twice without.")] = 20,
    seconds: Annotated[float, typer.Option(min=1, help="For everything; what was found by then is kept.")] = 300.0,
    contender: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time optimized steps of FLUX.1-dev's size with a random LoRA of rank 16 against the same steps without.

    The adapter lies on all attention and feed-forward layers of both block types.
    """
    import tempfile

    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import transformer as bench

    pick_device("cuda")
    names = [name for name, settings in bench.CONTENDERS.items() if "lora" in settings]
    with tempfile.TemporaryDirectory(prefix="tritflow-lora-") as folder:
        chosen = contender or names
        run = bench.bench(
            Path(folder), seconds=seconds, size=size, count=count, contenders=chosen, checked=False, say=say
        )
    run["note"] = note
    store(results, "lora", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))
