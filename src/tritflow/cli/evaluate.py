"""`tritflow evaluate`: score a model on a suite, alone or against its teacher."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int], None]]:
    """A bar a stage (drawing, scoring, ...) on stderr, with the time left; one line a stage when it is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from tritflow.cli.console import say
    from tritflow.evaluation.projection import duration

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        shown: dict[str, Any] = {}
        seen: dict[str, list[tuple[float, int]]] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in shown:
                shown[name] = bar.add_task(name, total=total)
            bar.update(shown[name], completed=done)
            # Loading ends with a second report of the same number, so that the first batch alone tells a pace; it also
            # warms up, which the later ones correct.
            reports = seen.setdefault(name, [])
            if not reports or done == reports[0][1]:
                reports[:] = [(time.monotonic(), done)]
            elif len(reports) < 4 and done > reports[-1][1]:
                reports.append((time.monotonic(), done))
                if len(reports) in (2, 4) and done < total and name.startswith("drawing"):
                    (before, had), (now, has) = reports[len(reports) // 2 - 1], reports[-1]
                    say(f"{name}: about {duration((now - before) / (has - had) * (total - has))} left")

        yield stage


def _scorers(given: list[str] | None) -> dict[str, str]:
    from tritflow.evaluation.api import EvaluationError

    chosen = {}
    for item in given or ():
        role, equals, source = item.partition("=")
        if not equals or not role or not source:
            raise EvaluationError(f"--scorer {item}: write ROLE=FOLDER or ROLE=HUB_ID")
        chosen[role] = source
    return chosen


def _each(rivals: str, given: dict[str, Any]) -> None:
    """`evaluate` with the arguments `given`, once for each rival."""
    from tritflow.cli.console import say
    from tritflow.evaluation.api import EvaluationError
    from tritflow.evaluation.rivals import evaluate_rivals
    from tritflow.pipelines.rivals import chosen_rivals

    if given["rival"] is not None:
        raise EvaluationError("give --rival or --rivals, not both")
    chosen = chosen_rivals(rivals)

    def one(rival: Any) -> None:
        folder = rival.settings.get("folder")
        name = rival.name if folder is None else f"{rival.name}={folder}"
        evaluate(**{**given, "rivals": None, "rival": name, "label": rival.title, "skip_done": True})

    failed = evaluate_rivals(chosen, one, say)
    if failed:
        say(f"{len(chosen) - len(failed)} of {len(chosen)} rivals done; not done: {', '.join(failed)}")
    if len(failed) == len(chosen):
        raise typer.Exit(1)


def evaluate(
    suite: Annotated[str, typer.Argument(help="Which suite: scenes, geneval or t2i-compbench.")] = "scenes",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model folder, hub id, small or small-student.")
    ] = "small-student",
    against: Annotated[
        str | None, typer.Option(help="Teacher: paired differences and fidelity from the same noise.")
    ] = None,
    per_tag: Annotated[int | None, typer.Option(min=1, help="Prompts a tag (default: the suite's own).")] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many prompts, all tags in turn: a dry run."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the prompts: val (default) or train of t2i-compbench.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of the suite's prompt files (default: what `prompts fetch` got).")
    ] = None,
    tags: Annotated[str | None, typer.Option(help="Only these tags, joined by commas.")] = None,
    seeds_per_prompt: Annotated[
        int | None, typer.Option(min=1, help="Pictures a prompt (default: the suite's own).")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise; the choice of prompts does not change.")] = 0,
    mode: Annotated[str | None, typer.Option(help="w2a16 or w2a8, for a ternary --model.")] = None,
    backend: Annotated[str | None, typer.Option(help="Kernels, for a ternary --model.")] = None,
    optimize: Annotated[
        bool, typer.Option("--optimize", help="Draw by the fused forward, the one that is timed; a ternary --model.")
    ] = False,
    rival: Annotated[
        str | None,
        typer.Option(help="Quantize a dense --model in memory by another method: nf4, quanto-int2, hqq-2, ..."),
    ] = None,
    rivals: Annotated[
        str | None,
        typer.Option(help="Each of these in turn, joined by commas, or `all` that can run here; resumes."),
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
    scorer: Annotated[
        list[str] | None,
        typer.Option(help="ROLE=FOLDER or ROLE=HUB_ID: detector, colors; vqa, detector, depth, judge, parser."),
    ] = None,
    scorer_batch: Annotated[int, typer.Option(min=1, help="Pictures scored at once.")] = 8,
    official: Annotated[
        bool, typer.Option("--official", help="Read what the suite's own scorer left with the pictures.")
    ] = False,
    draw_only: Annotated[bool, typer.Option("--draw-only", help="Stop when all pictures are there.")] = False,
    noise_seed: Annotated[
        int | None, typer.Option(help="Draw a second set from this seed too: how much seeds alone change.")
    ] = None,
    fidelity: Annotated[bool, typer.Option(help="Compare pictures with the teacher's.")] = True,
    lpips: Annotated[
        str | None, typer.Option(help="Safetensors file, folder or hub id with LPIPS (AlexNet) weights.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of pictures and verdicts; resumes there.")] = None,
    results: Annotated[Path | None, typer.Option(help="Also append the run to this folder of results.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the run as JSON and nothing else.")] = False,
    skip_done: Annotated[bool, typer.Option("--skip-done", help="Do nothing where the run is in --out.")] = False,
) -> None:
    """Score a model on a suite, alone or against its teacher; a killed run resumes.

    \b
    tritflow evaluate geneval --model OUT --against FLUX_DIR --limit 12     # dry run, projects the whole
    tritflow evaluate geneval --model OUT --against FLUX_DIR --scorer detector=MASK2FORMER_DIR
    torchrun --nproc-per-node 8 -m tritflow.cli.main evaluate t2i-compbench --model OUT --against FLUX_DIR
    tritflow evaluate t2i-compbench --model OUT --draw-only                 # then the suite's own scripts, then
    tritflow evaluate t2i-compbench --model OUT --official
    tritflow evaluate scenes --model small-student --against small
    tritflow evaluate scenes --model OUT --against FLUX_DIR --mode w2a8 --per-tag 20
    tritflow evaluate scenes --model small --rival hqq-2 --against small
    tritflow evaluate scenes --model small --rivals all --against small --per-tag 128 --results benchmarks/results
    """
    if rivals is not None:
        return _each(rivals, dict(locals()))
    from rich.console import Console

    from tritflow.cli.console import print_json, say
    from tritflow.evaluation.api import TaskOptions, get_task, limited, prompts_hash
    from tritflow.evaluation.contenders import contender, trained_prompts
    from tritflow.evaluation.projection import extrapolate
    from tritflow.evaluation.ranks import device_of_environment, shard_of_environment
    from tritflow.evaluation.rivals import done_before
    from tritflow.evaluation.run import Plan, Sampling, projections
    from tritflow.evaluation.run import evaluate as run_evaluation
    from tritflow.pipelines.loading import pick_device
    from tritflow.report.console import evaluation_tables
    from tritflow.results import append, path_for

    shard = shard_of_environment()
    device = device_of_environment(device)
    on = str(pick_device(device))
    task = get_task(suite, TaskOptions(prompts, _scorers(scorer), on, scorer_batch))
    chosen = [t.strip() for t in tags.split(",")] if tags else None
    records = task.prompts(split or task.splits[0], per_tag=per_tag, tags=chosen)
    whole = len(records)
    if limit is not None:
        records = limited(records, limit)
    sampling = Sampling(seeds_per_prompt or task.default_samples, seed, batch_size)
    common: dict[str, Any] = {"base": base, "device": device, "dtype": dtype}
    asked: dict[str, Any] = {
        "height": height,
        "width": width,
        "num_inference_steps": steps,
        "guidance_scale": guidance,
    }
    student = contender(model, mode=mode, backend=backend, rival=rival, optimized=optimize, **common, **asked)
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
    if skip_done and done_before(
        folder / "results.json", suite, student.model.hash, prompts_hash(records), (sampling.samples, seed)
    ):
        say(f"its results are in {folder} already")
        return
    perceptual = None
    if lpips is not None:
        from tritflow.evaluation.scorers.lpips import Lpips

        perceptual = Lpips(lpips, on)
    known = trained_prompts(model, trained_on, prompts)
    plan = Plan(noise_seed, official, draw_only, fidelity, perceptual, split, shard)
    ahead = projections(records, student, folder, teacher=teacher, sampling=sampling, plan=plan)
    missing = sum(p.pictures - p.present for p in ahead)
    if shard[0] == 0:
        for projection in ahead:
            say(str(projection))
    with _stages() as stage:
        run = run_evaluation(
            task,
            records,
            student,
            folder,
            teacher=teacher,
            sampling=sampling,
            label=label,
            trained_on=known,
            stage=stage if shard[0] == 0 else None,
            plan=plan,
        )
    if not run:
        if shard[0] == 0:
            say(f"all pictures are in {folder}")
        return
    append(folder / "results.json", suite, run)
    if results is not None:
        append(path_for(results, suite, run["device"]), suite, run)
    if limit is not None and (projected := extrapolate(run, missing, whole * sampling.samples * len(ahead))):
        say(projected)
    if as_json:
        print_json(run)
    else:
        console = Console()
        console.print(evaluation_tables(run))
        console.print(f"Pictures, verdicts and results: {folder}", style="dim", highlight=False)
