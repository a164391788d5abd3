"""`tritflow bench`: kernels, whole generations, and bytes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli.console import print_json, progress, say

app = typer.Typer(
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Measure kernels, latency and storage. Results append to a folder that `tritflow report` reads.",
    epilog="""Examples:

\b
  tritflow bench kernels                               # ternary linears on this CPU
  tritflow bench kernels --device cuda --quick         # the GPU kernels, two shapes
  tritflow bench latency --results benchmarks/results  # the small FLUX, dense and ternary
  tritflow bench storage --full-size --workdir /scratch
""",
)

Results = Annotated[
    Path | None,
    typer.Option("--results", metavar="DIR", help="Also append the result to this folder of results."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout and nothing else.")]
Device = Annotated[str, typer.Option("--device", help="cpu, cuda or cuda:N.")]
Threads = Annotated[int | None, typer.Option("--threads", min=1, help="Of PyTorch on the CPU (default: its own).")]
Note = Annotated[str, typer.Option("--note", help="Kept with the result, for instance that the machine was busy.")]


def _store(folder: Path | None, topic: str, runs: list[dict[str, Any]]) -> None:
    if folder is None:
        return
    from tritflow.results import append, path_for

    for run in runs:
        append(path_for(folder, topic, run["device"]), topic, run)
    say(f"appended to {path_for(folder, topic, runs[0]['device'])}")


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


_KERNELS = """Examples:

\b
  tritflow bench kernels
  tritflow bench kernels --threads 1 --seconds 30 --results benchmarks/results
  tritflow bench kernels --device cuda --quick --json
"""


@app.command(epilog=_KERNELS)
def kernels(
    device: Device = "cpu",
    seconds: Annotated[
        float | None,
        typer.Option(min=0.01, help="CPU: for each of three comparisons (10); GPU: stop after (240)."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="GPU: two shapes only.")] = False,
    threads: Threads = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Time ternary matrix products against the dense ones of the same machine.

    On a GPU every kernel variant is checked against the reference first, in a process of its own.
    """
    from tritflow.pipelines.loading import DeviceError, pick_device

    on = pick_device(device)
    if on.type == "cuda":
        run = _gpu_kernels(str(on), 240.0 if seconds is None else seconds, quick, note)
        _store(results, "kernels-cuda", [run])
        if json:
            print_json(run)
        return
    if on.type != "cpu":
        raise DeviceError(f"--device {device}: kernels are measured on cpu and cuda; use --device cpu")
    from tritflow.profiling import cpu

    _set_threads(threads)
    run = cpu.bench_cpu(10.0 if seconds is None else seconds, note)
    _store(results, "kernels-cpu", [run])
    if json:
        print_json(run)
    else:
        print(cpu.table(run))


def _gpu_kernels(device: str, seconds: float, quick: bool, note: str) -> dict[str, Any]:
    """The probe, whose running account goes to stderr."""
    import contextlib
    import json
    import sys
    import tempfile

    from tritflow.profiling.kernels import probe
    from tritflow.results import provenance

    with tempfile.TemporaryDirectory(prefix="tritflow-kernels-") as folder:
        with contextlib.redirect_stdout(sys.stderr):
            probe(Path(folder), seconds, quick)
        # Results hold no NaN; a ratio that could not be formed is absent.
        tasks = json.loads((Path(folder) / "kernels.json").read_text(), parse_constant=lambda _: None)
    return {**provenance(device), "quick": quick, "note": note, "tasks": tasks}


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
    _set_threads(threads)
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
    _store(results, f"latency-{on.type}", rows)
    if json:
        print_json(rows)
    else:
        print(bench.table(rows))


_STORAGE = """Examples:

\b
  tritflow bench storage                       # the small FLUX: bf16, 2-bit, base-3
  tritflow bench storage --full-size           # also FLUX.1-dev's config at its real size: minutes, 9 GB of disk
"""


@app.command(epilog=_STORAGE)
def storage(
    full_size: Annotated[
        bool,
        typer.Option("--full-size", help="Also write FLUX.1-dev's config at its real size, random content."),
    ] = False,
    workdir: Annotated[
        Path | None,
        typer.Option("--workdir", help="Where the real-size files lie meanwhile (default: temporary)."),
    ] = None,
    results: Results = None,
    json: Json = False,
) -> None:
    """Measure transformer folders on disk: dense bf16, 2-bit and base-3."""
    from tritflow.profiling import storage as bench

    with progress("measuring", shown=not json) as update:
        rows = bench.small_flux(lambda _, done, total: update(done, total))
    if full_size:
        with progress("writing files of real size", shown=not json) as update:
            rows += bench.full_size(workdir, progress=lambda _, done, total: update(done, total))
    _store(results, "storage", rows)
    if json:
        print_json(rows)
    else:
        print(bench.table(rows))


_SENSITIVITY = """Examples:

\b
  tritflow bench sensitivity                            # the small FLUX
  tritflow bench sensitivity --model FLUX_DIR --device cuda --plot sensitivity.svg --results benchmarks/results
"""


@app.command(epilog=_SENSITIVITY)
def sensitivity(
    model: Annotated[str, typer.Option("--model", "-m", help="A dense model: folder, hub id or small.")] = "small",
    prompts: Annotated[Path | None, typer.Option(help="A .txt or .jsonl (default: the model folder's own).")] = None,
    num_prompts: Annotated[int, typer.Option(min=1, help="Trajectories.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of each.")] = 8,
    bins: Annotated[int, typer.Option(min=1, help="Parts of the timesteps.")] = 4,
    column_scale: Annotated[bool, typer.Option("--column-scale", help="Round with column scales.")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs run at once.")] = 16,
    plot: Annotated[Path | None, typer.Option(help="Draw a figure, .svg or .png.")] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    results: Results = None,
    json: Json = False,
) -> None:
    """Velocity error when one linear alone is ternary: by layer, stream and timestep."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import sensitivity as bench

    if plot is not None and plot.suffix not in (".svg", ".png"):
        raise typer.BadParameter(f"--plot {plot}: name a .svg or .png file")
    on = pick_device(device)
    with progress("rounding one linear at a time", shown=not json) as update:
        run = bench.measure(
            model,
            prompts=prompts,
            num_prompts=num_prompts,
            num_inference_steps=steps,
            bins=bins,
            batch_size=batch_size,
            column_scale=column_scale,
            device=str(on),
            progress=update,
        )
    _store(results, f"sensitivity-{on.type}", [run])
    if plot is not None:
        from tritflow.calibration.artifacts import write_bytes
        from tritflow.report.figures import encode
        from tritflow.report.figures import sensitivity as draw

        write_bytes(plot, encode(draw(run), plot.suffix.removeprefix(".")))
        say(f"drew {plot}")
    if json:
        print_json(run)
    else:
        print(bench.table(run))


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
    seconds: Annotated[float, typer.Option(min=1, help="Start nothing new after this long.")] = 350.0,
    contender: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    attention: Annotated[str, typer.Option(help="cudnn, flash, default, or the fastest of them.")] = "fastest",
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
            Path(folder),
            seconds=seconds,
            size=size,
            batch=batch_size,
            contenders=contender or (),
            attention=attention,
            say=say,
        )
    run["note"] = note
    _store(results, "transformer", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))


@app.command()
def roofline(
    size: Annotated[int, typer.Option(min=16, help="Of the pictures, in pixels.")] = 1024,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Pictures at once.")] = 1,
    results: Results = None,
    json: Json = False,
) -> None:
    """Predict one step of FLUX.1-dev's transformer on GPUs that were not measured, from their datasheets."""
    from tritflow.profiling import roofline as bench

    run = bench.run(size, batch_size)
    _store(results, "roofline", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))


_END_TO_END = """Examples:

\b
  tritflow bench end-to-end                                   # the small ternary FLUX on this machine
  tritflow bench end-to-end OUT --base FLUX_DIR --device cuda --mode w2a8 --optimize
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
    rounds: Annotated[int, typer.Option(min=1, help="Pictures that count, after the first.")] = 5,
    threads: Threads = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Seconds from prompt to PNG: loading, text encoders, steps, VAE and file; the first picture told apart."""
    from tritflow.profiling import end_to_end as bench

    _set_threads(threads)
    with progress("generating", shown=not json) as update:
        run = bench.measure(
            model,
            base=base,
            device=device,
            dtype=dtype,
            mode=mode,
            backend=backend,
            optimized=optimize,
            rounds=rounds,
            note=note,
            progress=update,
        )
    _store(results, "end-to-end", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))


_TUNE = """Examples:

\b
  tritflow bench tune                                  # two to four minutes; used from then on
  tritflow bench tune --backend triton --tokens 1024
"""


@app.command(epilog=_TUNE)
def tune(
    backend: Annotated[list[str] | None, typer.Option(help="triton, scratch or hopper (the first two).")] = None,
    tokens: Annotated[list[int] | None, typer.Option(min=1, help="Rows of activations (4608, 4096, 512).")] = None,
    out: Annotated[Path | None, typer.Option(help="File of choices (default: in the cache folder).")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="Start nothing new after this long.")] = 240.0,
    json: Json = False,
) -> None:
    """Find the fastest kernel for each of FLUX.1-dev's products on this GPU, and use it from then on."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import tune as bench

    pick_device("cuda")
    times = bench.tune(
        out,
        backends=tuple(backend or bench.BACKENDS),
        tokens=tuple(tokens or bench.TOKENS),
        seconds=seconds,
        say=say,
    )
    if json:
        print_json(times)


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
    run = throughput.measure(
        scorer or (), device=on, pictures=pictures, size=size, batch_size=batch_size, say=None if json else say
    )
    run["note"] = note
    _store(results, "scorers", [run])
    if json:
        print_json(run)
    else:
        print(throughput.table(run))

