"""The Typer application of `tritflow bench`."""

from __future__ import annotations

import typer

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Measure kernels, latency and storage. Results append to a folder that `tritflow report` reads.",
    epilog="""Examples:

\b
  tritflow bench kernels                               # ternary linears on this CPU
  tritflow bench kernels --device cuda --quick         # the GPU kernels, two shapes
  tritflow bench latency --results benchmarks/results  # the small FLUX, dense and ternary
  tritflow bench detector                              # does the scenes suite read true pictures right?
  tritflow bench storage --full-size --workdir /scratch
""",
)
