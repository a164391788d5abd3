"""`tritflow bench storage|full-size|sensitivity|exposure`: bytes, real size, and where a model's error comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Json, Note, Results, store
from tritflow.cli.console import print_json, progress, say

_PROMPTS = "A .txt or .jsonl, or held-out:N: N a tag of the suite scenes (default: the {} folder's own)."

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
    store(results, "storage", rows)
    if json:
        print_json(rows)
    else:
        print(bench.table(rows))


_FULL_SIZE = """Examples:

\b
  tritflow bench full-size --workdir /scratch/full         # 30 GB of disk, some minutes; cut short, it goes on
  tritflow bench full-size --workdir /scratch/full --results benchmarks/results
"""


@app.command("full-size", epilog=_FULL_SIZE)
def full_size(
    workdir: Annotated[Path, typer.Option("--workdir", help="Where the files lie; kept, so that a next call goes on.")],
    stage: Annotated[list[str] | None, typer.Option(help="Only this one; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(min=1, help="For everything; what was found by then is kept.")] = 900.0,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Quantize and load FLUX.1-dev's config at its real size on a GPU: seconds, peak memory, bytes.

    Random weights stand in for the checkpoint. Files are dropped from the page cache first, so reading is cold.
    """
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import full_size as bench

    pick_device("cuda")
    run = bench.bench(workdir, stages=stage or bench.STAGES, seconds=seconds, say=say)
    run["note"] = note
    store(results, "full-size", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))


_SENSITIVITY = """Examples:

\b
  tritflow bench sensitivity                            # the small FLUX
  tritflow bench sensitivity --model FLUX_DIR --device cuda --plot sensitivity.svg --results benchmarks/results
"""


@app.command(epilog=_SENSITIVITY)
def sensitivity(
    model: Annotated[str, typer.Option("--model", "-m", help="A dense model: folder, hub id or small.")] = "small",
    prompts: Annotated[Path | None, typer.Option(help=_PROMPTS.format("model"))] = None,
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
    store(results, "sensitivity", [run])
    if plot is not None:
        from tritflow.calibration.artifacts import write_bytes
        from tritflow.report.figures import encode
        from tritflow.report.figures import sensitivity as draw

        write_bytes(plot, encode(draw([run]), plot.suffix.removeprefix(".")))
        say(f"drew {plot}")
    if json:
        print_json(run)
    else:
        print(bench.table(run))


_EXPOSURE = """Examples:

\b
  tritflow bench exposure                               # the shipped student
  tritflow bench exposure --model OUT --against FLUX_DIR --device cuda --results benchmarks/results
"""


@app.command(epilog=_EXPOSURE)
def exposure(
    model: Annotated[str, typer.Option("--model", "-m", help="A student: folder or small-student.")] = "small-student",
    against: Annotated[str, typer.Option(help="Its teacher.")] = "small",
    prompts: Annotated[Path | None, typer.Option(help=_PROMPTS.format("teacher"))] = None,
    num_prompts: Annotated[int, typer.Option(min=2, help="Trajectories.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of each.")] = 28,
    guidance: Annotated[float | None, typer.Option(min=0, help="Default: the teacher's own.")] = None,
    mode: Annotated[str | None, typer.Option(help="w2a16 or w2a8, of a ternary student.")] = None,
    label: Annotated[str | None, typer.Option(help="Name in figures (default: the student's).")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pairs run at once.")] = 16,
    seed: Annotated[int, typer.Option(help="Of noise and choice of prompts.")] = 0,
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    results: Results = None,
    json: Json = False,
) -> None:
    """Velocity error of a student on its teacher's states and on its own, step by step."""
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import exposure as bench

    on = pick_device(device)
    with progress("following teacher and student", shown=not json) as update:
        run = bench.measure(
            model,
            against,
            prompts=prompts,
            num_prompts=num_prompts,
            num_inference_steps=steps,
            guidance_scale=guidance,
            batch_size=batch_size,
            seed=seed,
            mode=mode,
            label=label,
            device=str(on),
            progress=update,
        )
    store(results, "exposure", [run])
    if json:
        print_json(run)
    else:
        print(bench.table(run))
