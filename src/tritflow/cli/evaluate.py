"""`tritflow evaluate`: score a model on a suite, alone or against its teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage (drawing, scoring, ...) on stderr, with the time left; nothing when it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown: dict[str, Any] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in shown:
                shown[name] = bar.add_task(name, total=total)
            bar.update(shown[name], completed=done)

        yield stage


def evaluate(
    suite: Annotated[str, typer.Argument(help="Which suite: scenes.")] = "scenes",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model folder, hub id, small or small-student.")
    ] = "small-student",
    against: Annotated[
        str | None, typer.Option(help="Teacher: paired differences and fidelity from the same noise.")
    ] = None,
    per_tag: Annotated[int | None, typer.Option(min=1, help="Prompts a tag (default: the suite's own).")] = None,
    tags: Annotated[str | None, typer.Option(help="Only these tags, joined by commas.")] = None,
    seeds_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Pictures a prompt (default: the suite's own).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the choice of prompts does not change.")] = 0,
    mode: Annotated[str | None, typer.Option(help="w2a16 or w2a8, for a ternary --model.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels, for a ternary --model.")] = None,
    rival: Annotated[
        str | None,
        typer.Option(help="Quantize a dense --model in memory by another method: nf4, quanto-int2, hqq-2, ..."),
    ] = None,
    base: Annotated[str | None, typer.Option(help="Pipeline that completes a bare transformer.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:N or mps (default: the fastest).")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels (default: the model's own).")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels (default: the model's own).")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps (default: the model's own).")] = None,
    guidance: Annotated[float | None, typer.Option(min=0, help="Default: the model's own.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 16,
    label: Annotated[str | None, typer.Option(help="Name of this run in tables.")] = None,
    trained_on: Annotated[
        Path | None, typer.Option(help="Prompts the model was trained on (.txt, .jsonl or a folder).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of pictures and verdicts; resumes there.")] = None,
    results: Annotated[Path | None, typer.Option(help="Also append the run to this folder of results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run as JSON and nothing else.")] = False,
) -> None:
    """Score a model on a suite, alone or against its teacher; a killed run resumes.

    \b
    tritflow evaluate scenes --model small-student --against small
    tritflow evaluate scenes --model OUT --against FLUX_DIR --mode w2a8 --per-tag 20
    tritflow evaluate scenes --model small --rival hqq-2 --against small
    """
    from rich.console import Console

    from tritflow.cli.console import print_json
    from tritflow.evaluation.api import get_task
    from tritflow.evaluation.contenders import contender, trained_prompts
    from tritflow.evaluation.run import Sampling
    from tritflow.evaluation.run import evaluate as run_evaluation
    from tritflow.report.console import evaluation_tables
    from tritflow.results import append, path_for

    task = get_task(suite)
    records = task.prompts(per_tag=per_tag, tags=[t.strip() for t in tags.split(",")] if tags else None)
    sampling = Sampling(seeds_per_prompt or task.default_samples, seed, batch_size)
    common: dict[str, Any] = {"base": base, "device": device, "dtype": dtype}
    asked: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    student = contender(model, mode=mode, backend=backend, rival=rival, **common, **asked)
    teacher = None
    if against is not None:
        # The teacher draws as its student does, or the two would not start from the same noise.
        same = student.settings
        teacher = contender(
            against,
            **common,
            height=same.height,
            width=same.width,
            num_inference_steps=same.num_inference_steps,
            guidance_scale=same.guidance_scale,
        )
    folder = out or Path("runs/eval") / f"{suite}-{len(records)}x{sampling.samples}-seed{seed}"
    with _stages() as stage:
        run = run_evaluation(
            task,
            records,
            student,
            folder,
            teacher=teacher,
            sampling=sampling,
            label=label,
            trained_on=trained_prompts(model, trained_on),
            mask=task.object_mask(),
            stage=stage,
        )
    append(folder / "results.json", suite, run)
    if results is not None:
        append(path_for(results, suite, run["device"]), suite, run)
    if as_json:
        print_json(run)
    else:
        console = Console()
        console.print(evaluation_tables(run))
        console.print(f"Pictures, verdicts and results: {folder}", style="dim", highlight=False)
