"""`tritflow bench latency|transformer|roofline|end-to-end`: how long pictures take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Note, Results, Threads, set_threads, store
from tritflow.cli.console import print_json, progress, say

_LATENCY = """Examples:

\b
  tritflow bench latency
  tritflow bench latency --batch-size 1 --batch-size 4 --rounds 15 --threads 1
  tritflow bench latency --dense FLUX_DIR --ternary OUT --device cuda --batch-size 1
"""


@app.command(epilog=_LATENCY)
def latency(
    dense: Annotated[str, typer.Option(help="Model in full precision: folder, hub id or small.")] = "small",
    ternary: Annotated[str, typer.Option(help="Its ternary twin: folder, hub id or small-student.")] = "small-student",
    base: Annotated[str | None, typer.Option(help="Pipeline that completes a bare ternary transformer.")] = None,
    device: Device = "cpu",
    batch_size: Annotated[
        list[int] | None,
        typer.Option("--batch-size", min=1, help="Pictures at once; may be repeated (1 and 4)."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Generations of each candidate that count.")] = 7,
    threads: Threads = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time whole generations (text encoders, sampler, VAE): dense fp32 and bf16, W2A16 and W2A8, taking turns."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import latency as bench

    on = pick_device(device)
    set_threads(threads)
    with progress("generating", shown=not json) as update:
        rows = bench.measure(
            dense,
            ternary,
            base=base,
            device=str(on),
            batch_sizes=batch_size or [1, 4],
            rounds=rounds,
            note=note,
            progress=update,
        )
    store(results, f"latency-{on.type}", rows)
    if json:
        print_json(rows)
    else:
        print(bench.table(rows))


_TRANSFORMER = """Examples:

\b
  tritflow bench transformer                                   # about six minutes of one Hopper GPU
  tritflow bench transformer --size 2048 --results benchmarks/results
  tritflow bench transformer --contender "bf16 compiled" --contender "W2A8 fp8 optimized, scratch"
"""


@app.command(epilog=_TRANSFORMER)
def transformer(
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at once.")] = 1,
    seconds: Annotated[float, typer.Option(min=1, help="For everything; what was found by then is kept.")] = 350.0,
    contender: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    attention: Annotated[str, typer.Option(help="cudnn, flash, default, or the fastest of them.")] = "fastest",
    out: Annotated[
        Path | None,
        typer.Option(help="Keep what is found here; a next call on the same GPU measures only what is missing."),
    ] = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time one step of FLUX.1-dev's transformer on a GPU, and its peak memory, with random weights of its real size.

    Dense bf16 (eager, compiled), dense fp8 (compiled), ternary W2A8 and W2A16, stock and optimized.
    """
    import tempfile

    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import transformer as bench

    pick_device("cuda")
    with tempfile.TemporaryDirectory(prefix="tritflow-transformer-") as folder:
        run = bench.bench(
            out or Path(folder),
            seconds=seconds,
            size=size,
            batch=batch_size,
            contenders=contender or (),
            attention=attention,
            resume=out is not None,
            say=say,
        )
    run["note"] = note
    store(results, "transformer", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))


@app.command()
def roofline(
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at once.")] = 1,
    measured: Annotated[
        Path | None,
        typer.Option(help="Results of `bench transformer`; the newest run's shares of its GPU are assumed of all."),
    ] = None,
    results: Results = None,
    json: Json = False,
) -> None:
    """Predict one step of FLUX.1-dev's transformer on GPUs that were not measured, from their datasheets."""
    from tritflow.profiling import roofline as bench

    known = None
    if measured is not None:
        from tritflow.results import read

        runs = [r for r in read(measured, "transformer") if r["settings"]["size"] == size]
        if not runs:
            raise typer.BadParameter(f"{measured} has no run at {size}x{size}; measure one, or give another --size")
        known = runs[-1]
    run = bench.run(size, batch_size, known)
    store(results, "roofline", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))


_END_TO_END = """Examples:

\b
  tritflow bench end-to-end                                   # the small ternary FLUX on this machine
  tritflow bench end-to-end OUT --base FLUX_DIR --device cuda --mode w2a8 --optimize
  tritflow bench end-to-end --random --device cuda --mode w2a8 --optimize  # FLUX.1-dev's real size, random weights
  tritflow bench end-to-end OUT --base FLUX_DIR --device cuda --first-use  # in fresh processes, kernels compiled anew
"""


@app.command("end-to-end", epilog=_END_TO_END)
def end_to_end(
    model: Annotated[str, typer.Argument(help="Folder, hub id, small or small-student.")] = "small-student",
    base: Annotated[str | None, typer.Option(help="Pipeline that completes a bare ternary transformer.")] = None,
    device: Device = "cpu",
    dtype: Annotated[str | None, typer.Option(help="Of what is not ternary.")] = None,
    mode: Annotated[str | None, typer.Option(help="w2a16 or w2a8 (default: the folder's).")] = None,
    backend: Annotated[str | None, typer.Option(help="Which kernels (default: the folder's).")] = None,
    optimize: Annotated[bool, typer.Option("--optimize", help="Run the fused forward.")] = False,
    random: Annotated[
        bool, typer.Option("--random", help="FLUX.1-dev's configs with random weights in place of MODEL.")
    ] = False,
    first_use: Annotated[
        bool,
        typer.Option("--first-use", help="In two fresh processes, no kernel compiled at first (--random: always)."),
    ] = False,
    workdir: Annotated[
        Path | None,
        typer.Option("--workdir", help="Where the random model (13 GB) is written, and kept (default: temporary)."),
    ] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For --first-use; what was found by then is kept.")] = 400.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Of the sampler (default: the model's own).")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pictures that count, after the first.")] = 5,
    threads: Threads = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Seconds from prompt to PNG: loading, text encoders, steps, VAE and file; the first picture told apart."""
    from tritflow.profiling import end_to_end as bench

    set_threads(threads)
    if random or first_use:
        from tritflow.pipelines.loading import pick_device
        from tritflow.profiling import first_use as fresh

        run = fresh.bench(
            None if random else model,
            workdir,
            base=base,
            device=str(pick_device(device)),
            dtype=dtype,
            mode=mode,
            backend=backend,
            optimized=optimize,
            num_inference_steps=steps,
            rounds=rounds,
            seconds=seconds,
            note=note,
            say=say,
        )
        _told(results, run, json, bench.table(run))
        return
    with progress("generating", shown=not json) as update:
        run = bench.measure(
            model,
            base=base,
            device=device,
            dtype=dtype,
            mode=mode,
            backend=backend,
            optimized=optimize,
            num_inference_steps=steps,
            rounds=rounds,
            note=note,
            progress=update,
        )
    _told(results, run, json, bench.table(run))


def _told(results: Path | None, run: dict[str, Any], json: bool, table: str) -> None:
    store(results, "end-to-end", [run])
    if json:
        print_json(run)
    else:
        print(table)
