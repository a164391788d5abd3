"""`tritflow bench distillation`: what a step of end-to-end distillation costs at a model's real size."""

from __future__ import annotations

from typing import Annotated

import typer

from tritflow.cli.bench.app import app
from tritflow.cli.bench.options import Device, Json, Note, Results, store, whole_numbers
from tritflow.cli.console import print_json, progress

_DISTILLATION = """Examples:

\b
  tritflow bench distillation --device cuda --results benchmarks/results     # FLUX.1-dev's size: one card of 80 GB
  tritflow bench distillation --device cuda --pixels 512 --batch-size 1,8,16
  tritflow bench distillation --device cuda --latent-store ram --batch-size 1,4   # 24 GB, and 48 GB of memory
  tritflow bench distillation --device cuda --recipe large-offloaded --batch-size 4 --budget 15GiB   # as a smaller card
  tritflow bench distillation --like small --pixels 128 --text-tokens 64 --recipe balanced   # on this CPU
"""


@app.command(epilog=_DISTILLATION)
def distillation(
    device: Device = "cpu",
    like: Annotated[
        str | None, typer.Option(help="A dense FLUX.1 folder or `small`, whose shape is taken (default: FLUX.1-dev).")
    ] = None,
    recipe: Annotated[str, typer.Option(help="Whose optimiser and settings are taken.")] = "large-distilled",
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Compile the blocks (default: as the recipe).")
    ] = None,
    pixels: Annotated[int, typer.Option(min=16, help="Height and width of the pictures.")] = 1024,
    text_tokens: Annotated[int, typer.Option("--text-tokens", min=1, help="Of each prompt.")] = 512,
    batch_size: Annotated[str, typer.Option("--batch-size", help="Pairs a step, joined by commas.")] = "1,8",
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed, after one that is not.")] = 3,
    latent_store: Annotated[
        str | None, typer.Option("--latent-store", help="device or ram (default: as the recipe).")
    ] = None,
    budget: Annotated[
        str | None, typer.Option(help="GPU memory to which PyTorch is held, CUDA's own included, such as 23GiB.")
    ] = None,
    note: Note = "",
    results: Results = None,
    json: Json = False,
) -> None:
    """Seconds and peak memory of an optimiser step of the whole student, with random weights."""
    from torch._dynamo.exc import TorchDynamoException

    from tritflow.config import ConfigError, parse_bytes
    from tritflow.pipelines.loading import pick_device
    from tritflow.profiling import distillation as bench
    from tritflow.profiling.quantization import config_like
    from tritflow.recipes import load_recipe, override

    batches = whole_numbers("--batch-size", batch_size)
    chosen = load_recipe(recipe)
    if not chosen.distillation.steps:
        raise ConfigError(f"recipe '{chosen.name}' distils nothing; take another --recipe")
    given = {"distillation.compile_blocks": compiled, "streaming.latent_store": latent_store}
    chosen = override(chosen, [f"{key}={str(value).lower()}" for key, value in given.items() if value is not None])
    config, name = config_like(like)
    on = str(pick_device(device))
    try:
        with progress("measuring", shown=not json) as update:
            runs = bench.measure_steps(
                config,
                chosen.distillation,
                model=name,
                device=on,
                pixels=pixels,
                text_tokens=text_tokens,
                batches=batches,
                steps=steps,
                latent_store=chosen.streaming.latent_store,
                budget=None if budget is None else parse_bytes(budget),
                progress=update,
            )
    except TorchDynamoException as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"the blocks could not be compiled on this machine ({why}); add --no-compile") from None
    for run in runs:
        run |= {"recipe": chosen.name, "note": note}
    store(results, f"distillation-{on.partition(':')[0]}", runs)
    if json:
        print_json(runs)
        return
    print(f"{name}, {runs[0]['weights'] / 1e9:.2f} G latent weights, {pixels}x{pixels}, on {runs[0]['device']}")
    for run in runs:
        if run["fits"]:
            print(f"batch {run['batch_size']:>4}: {run['seconds']:>8.3f} s a step, {run['peak_bytes'] / 1e9:.1f} GB")
        else:
            print(f"batch {run['batch_size']:>4}: does not fit")
