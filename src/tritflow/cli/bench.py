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
