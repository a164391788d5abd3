"""Options that several verbs share, so that they read and mean the same everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="A model folder, a hub id, or the built-in small / small-student."),
]
Base = Annotated[
    str | None,
    typer.Option("--base", help="Pipeline with the text encoders and VAE that a bare transformer folder lacks."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Of all that is not ternary: auto, float32, bfloat16 or float16."),
]
Mode = Annotated[
    str | None,
    typer.Option("--mode", help="w2a16, or w2a8 for 8-bit activations; default: as the checkpoint says."),
]
Backend = Annotated[
    str | None,
    typer.Option("--backend", help="Kernels: auto, reference, cpu, triton or hopper; default: as the checkpoint says."),
]
Seed = Annotated[int, typer.Option("--seed", "-s", help="Seed of the noise.")]
Height = Annotated[int | None, typer.Option("--height", help="Pixels; a multiple of 16. Default: the model's own.")]
Width = Annotated[int | None, typer.Option("--width", help="Pixels; a multiple of 16. Default: the model's own.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampler steps. Default: the model's own.")]
Guidance = Annotated[float | None, typer.Option("--guidance", help="Guidance scale. Default: the model's own.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Pictures drawn at once.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
