"""`tritflow generate`: prompts in, PNG files out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli import options as o
from tritflow.cli.console import print_json, progress, say

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow generate "a red circle above a blue star"
  tritflow generate "a green ring" "two yellow crosses" --model OUT --out pictures.png
  tritflow generate "a red cube on a blue sphere" -m OUT --base FLUX_DIR --device cuda -n 4 --seed 7
  tritflow generate "a red cube on a blue sphere" -m OUT --device cuda --max-memory 6GiB
"""


@app.command(epilog=_EXAMPLES)
def generate(
    prompts: Annotated[list[str], typer.Argument(help="One picture a prompt.")],
    model: o.Model = "small-student",
    out: o.Out = Path("picture.png"),
    seed: o.Seed = 0,
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="Pictures a prompt, from seeds on.")] = 1,
    height: o.Height = None,
    width: o.Width = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", help="Text tokens that are read. Default: the model's own.")
    ] = None,
    batch_size: o.BatchSize = 4,
    base: o.Base = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    mode: o.Mode = None,
    backend: o.Backend = None,
    max_memory: Annotated[
        str | None,
        typer.Option("--max-memory", help="Of the GPU, such as 6GiB: plan what lies where, say it, and keep to it."),
    ] = None,
    json: o.Json = False,
) -> None:
    """Draw pictures from prompts, from noise that depends on the seed alone.

    One picture is written to OUT; several become OUT-0.png, OUT-1.png and so on.
    """
    from tritflow.pipelines.generate import generate as draw
    from tritflow.pipelines.generate import picture_path, save_pictures
    from tritflow.pipelines.loading import load_pipeline, quiet

    picture_path(out)
    plan = None
    if max_memory is not None:
        from tritflow.pipelines.offloading import plan_memory

        plan = plan_memory(
            model,
            max_memory,
            height=height,
            width=width,
            batch=min(batch_size, count * len(prompts)),
            max_sequence_length=max_tokens,
            base=base,
            device=device,
            dtype=dtype,
        )
        for line in plan.lines():
            say(line)
    with quiet():
        pipe = load_pipeline(model, base=base, device=device, dtype=dtype, mode=mode, backend=backend, plan=plan)
    texts = [text for text in prompts for _ in range(count)]
    seeds = [seed + i for _ in prompts for i in range(count)]
    start = time.perf_counter()
    with progress("drawing", shown=not json) as update:
        images = draw(
            pipe,
            texts,
            seeds,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=max_tokens,
            batch_size=batch_size,
            on_step=update,
        )
    seconds = time.perf_counter() - start
    notes = [{"prompt": t, "seed": str(s), "model": model} for t, s in zip(texts, seeds, strict=True)]
    paths = save_pictures(images, out, notes)
    if json:
        rows = [{"path": str(p), "prompt": t, "seed": s} for p, t, s in zip(paths, texts, seeds, strict=True)]
        plans = {} if plan is None else {"memory_plan": plan.to_dict()}
        print_json({"model": model, "pictures": rows, "seconds": round(seconds, 3), **plans})
    else:
        for path in paths:
            print(path)
        say(f"{len(paths)} pictures in {seconds:.1f} s" if len(paths) > 1 else f"1 picture in {seconds:.1f} s")
