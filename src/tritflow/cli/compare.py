"""`tritflow compare`: the same prompts from the same noise with several models, one captioned PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from tritflow.cli import options as o
from tritflow.cli.console import print_json, progress, say

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow compare "a red circle above a blue star" --models small small-student
  tritflow compare "a red cube" "two dogs" --out grid.png --seed 3 --models FLUX_DIR OUT
  tritflow compare "a red cube" "two dogs" "a tree" --across --models FLUX_DIR OUT
"""


class _ManyModels(TyperCommand):
    """Lets `--models A B C` stand for `--models A --models B --models C`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        listing = False
        for arg in args:
            if arg.startswith("-"):
                listing = arg == "--models"
            elif listing and spread[-1] != "--models":
                spread.append("--models")
            spread.append(arg)
        return super().parse_args(ctx, spread)


@app.command(cls=_ManyModels, epilog=_EXAMPLES)
def compare(
    prompts: Annotated[list[str], typer.Argument(help="One row of pictures a prompt.")],
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--models",
            "-m",
            help="Two or more, after the prompts; the first is the reference. Default: both built-in.",
        ),
    ] = None,
    out: o.Out = Path("compare.png"),
    seed: o.Seed = 0,
    height: o.Height = None,
    width: o.Width = None,
    steps: o.Steps = None,
    guidance: o.Guidance = None,
    batch_size: o.BatchSize = 4,
    base: o.Base = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    mode: o.Mode = None,
    backend: o.Backend = None,
    across: Annotated[bool, typer.Option("--across", help="Prompts side by side, a row a model.")] = False,
    json: o.Json = False,
) -> None:
    """Draw the same prompts from the same noise with each model, side by side, with the PSNR to the first.

    --mode and --backend apply to the ternary models among them.
    """
    from tritflow.pipelines.compare import compare as draw
    from tritflow.pipelines.compare import format_psnr
    from tritflow.pipelines.generate import picture_path, save_pictures
    from tritflow.pipelines.loading import quiet

    picture_path(out)
    with progress("drawing", shown=not json) as update, quiet():
        result = draw(
            models or ["small", "small-student"],
            prompts,
            seed,
            base=base,
            device=device,
            dtype=dtype,
            mode=mode,
            backend=backend,
            on_model=None if json else say,
            on_step=update,
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance,
            batch_size=batch_size,
        )
    (path,) = save_pictures([result.grid(across)], out)
    if json:
        print_json({**result.to_dict(), "grid": str(path)})
        return
    for label, row in list(zip(result.labels, result.psnr, strict=True))[1:]:
        for prompt, db in zip(result.prompts, row, strict=True):
            print(f"{label}: {format_psnr(db)}: {prompt}")
    print(path)
