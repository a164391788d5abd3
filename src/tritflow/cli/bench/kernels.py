"""`tritflow bench kernels|tune`: kernels and their tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Note, Results, Threads, set_threads, store
from tritflow.cli.console import print_json, say

_TUNED = ("few rows", "adaln", "first factor", "attention", "products")
_PARTS = ("passes", "few rows", "first factor", "16-bit products", "products", "gemlite")
_KERNELS = """Examples:

\b
  tritflow bench kernels
  tritflow bench kernels --threads 1 --seconds 30 --results benchmarks/results
  tritflow bench kernels --device cuda --quick --json
  tritflow bench kernels --device cuda --only passes --only "few rows" --seconds 60
"""


@app.command(epilog=_KERNELS)
def kernels(
    device: Device = "cpu",
    seconds: Annotated[
        float | None,
        typer.Option(min=0.01, help="CPU: for each of three comparisons (10); GPU: stop after (240)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="GPU: two shapes only.")] = False,
    only: Annotated[list[str] | None, typer.Option(help=f"GPU: a part of the run: {', '.join(_PARTS)}.")] = None,
    threads: Threads = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time ternary matrix products against the dense ones of the same machine.

    On a GPU every kernel variant is checked against the reference first, in a process of its own.
    """
    from tritflow.pipelines.loading import DeviceError, pick_device

    _known(only, _PARTS)
    on = pick_device(device)
    if on.type == "cuda":
        run = _gpu_kernels(str(on), 240.0 if seconds is None else seconds, quick, note, tuple(only or ()))
        store(results, "kernels-cuda", [run])
        if json:
            print_json(run)
        return
    if only:
        raise DeviceError("--only chooses parts of the run on a GPU; add --device cuda")
    if on.type != "cpu":
        raise DeviceError(f"--device {device}: kernels are measured on cpu and cuda; use --device cpu")
    from tritflow.profiling import cpu

    set_threads(threads)
    run = cpu.bench_cpu(10.0 if seconds is None else seconds, note)
    store(results, "kernels-cpu", [run])
    if json:
        print_json(run)
    else:
        print(cpu.table(run))


def _known(only: list[str] | None, parts: tuple[str, ...]) -> None:
    from tritflow.config import nearest

    for part in only or ():
        if part not in parts:
            raise typer.BadParameter(f"no part '{part}'{nearest(part, list(parts))}: use one of {', '.join(parts)}")


def _gpu_kernels(device: str, seconds: float, quick: bool, note: str, only: tuple[str, ...]) -> dict[str, Any]:
    """The probe, whose running account goes to stderr."""
    import contextlib
    import sys
    import tempfile

    from tritflow.profiling.kernels import DEFAULT_PARTS, bench_gpu

    with tempfile.TemporaryDirectory(prefix="tritflow-kernels-") as folder, contextlib.redirect_stdout(sys.stderr):
        return bench_gpu(device, seconds, quick, note, Path(folder), only or DEFAULT_PARTS)


_TUNE = """Examples:

\b
  tritflow bench tune                                  # two to four minutes; used from then on
  tritflow bench tune --backend triton --tokens 1024
  tritflow bench tune --only attention --only "few rows" --seconds 90
"""


@app.command(epilog=_TUNE)
def tune(
    backend: Annotated[list[str] | None, typer.Option(help="triton, scratch or hopper (all).")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Rows of activations (4608, 4096, 512).")] = None,
    out: Annotated[Path | None, typer.Option(help="File of choices (default: in the cache folder).")] = None,
    only: Annotated[list[str] | None, typer.Option(help=f"A part: {', '.join(_TUNED)}.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Start nothing new after this long.")] = 240.0,
    json: Json = False,
) -> None:
    """Find the fastest kernel for each of FLUX.1-dev's products and passes on this GPU, and use it from then on."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import tune as bench

    _known(only, _TUNED)
    pick_device("cuda")
    times = bench.tune(
        out,
        backends=tuple(backend or bench.BACKENDS),
        tokens=tuple(tokens or bench.TOKENS),
        parts=tuple(only or bench.PARTS),
        seconds=seconds,
        say=say,
    )
    if json:
        print_json(times)
