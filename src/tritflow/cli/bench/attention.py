"""`tritflow bench attention`: 8-bit attention against PyTorch's."""

from __future__ import annotations

from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Json, Note, Results, store
from tritflow.cli.console import print_json, say

_ATTENTION = """Examples:

\b
  tritflow bench attention                             # FLUX.1-dev at 1024x1024
  tritflow bench attention --tokens 1536 --tokens 16896 --results benchmarks/results
"""


@app.command(epilog=_ATTENTION)
def attention(
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Text and image tokens (4608).")] = None,
    heads: Annotated[int, typer.Option(min=1)] = 24,
    features: Annotated[int, typer.Option(min=32, help="Of a head; a power of two.")] = 128,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time 8-bit attention on this GPU against cuDNN and flash attention in bf16, and state all their errors."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling.attention import bench

    pick_device("cuda")
    result = bench([(count, heads, features) for count in tokens or [4608]], note, say=say)
    store(results, "attention", [result])
    if json:
        print_json(result)
