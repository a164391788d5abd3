"""`tritflow reproduce`: from a dense FLUX folder to the paper's tables and figures, in stages that resume."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli import options as o
from tritflow.cli.console import print_json, progress, say

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow reproduce FLUX_DIR --plan                       # stages, pictures, disk and time; nothing is done
  tritflow reproduce FLUX_DIR --limit 12 --yes             # the whole way in small, which tells the pace
  tritflow reproduce FLUX_DIR --recipe best --device cuda --yes
  tritflow reproduce small --limit 8 --samples 1 --yes     # the built-in model, scenes suite
  tritflow reproduce FLUX_DIR --suite geneval --scorer geneval:detector=MASK2FORMER_DIR --yes
"""


def _scorers(given: list[str] | None) -> dict[str, dict[str, str]]:
    from tritflow.reproduction.engine import ReproductionError

    chosen: dict[str, dict[str, str]] = {}
    for item in given or ():
        where, equals, source = item.partition("=")
        suite, colon, role = where.partition(":")
        if not (equals and colon and suite and role and source):
            raise ReproductionError(f"--scorer {item}: write SUITE:ROLE=FOLDER or SUITE:ROLE=HUB_ID")
        chosen.setdefault(suite, {})[role] = source
    return chosen


@app.command(epilog=_EXAMPLES)
def reproduce(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A dense FLUX folder, such as FLUX.1-dev's, or small.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder (default: runs/reproduce/NAME); resumes there.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="As of `quantize` (default: large; demo for small).")
    ] = None,
    suite: Annotated[
        list[str] | None, typer.Option(help="Repeatable (default: geneval and t2i-compbench; scenes for small).")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many prompts a suite, all tags in turn.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Pictures a prompt (default: the suite's own).")] = None,
    seed: o.Seed = 0,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Sampler steps (default: the model's own; 50 where time is taken).")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Pictures drawn at once.")] = 16,
    scorer_batch: Annotated[int, typer.Option(min=1, help="Pictures scored at once.")] = 8,
    scorer: Annotated[list[str] | None, typer.Option(help="SUITE:ROLE=FOLDER or SUITE:ROLE=HUB_ID.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of the suites' prompt files (default: fetched where they are missing).")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Calibration prompts (default: the model's own, or the paper's 7,232).")
    ] = None,
    kernel_off: Annotated[
        bool, typer.Option("--kernel-off/--no-kernel-off", help="Also draw and score without kernels.")
    ] = True,
    rounds: Annotated[int, typer.Option(min=1, help="Pictures whose time is taken.")] = 5,
    device: o.Device = "auto",
    dtype: o.Dtype = "auto",
    plan: Annotated[bool, typer.Option("--plan", help="Show the plan and stop.")] = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Start, though it takes over an hour or nobody knows.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Quantize, verify, draw, score, measure and report: the paper's tables from one command.

    Shows what it will take first. Killed, the same command goes on where it stopped; whatever was made from other
    settings is made again, and what depends on it too.
    """
    from tritflow.reproduction import run as way
    from tritflow.reproduction.engine import ReproductionError
    from tritflow.reproduction.request import PAPER_SUITES, Request

    suites = tuple(suite or ())
    name = Path(model).resolve().name if Path(model).is_dir() else model
    request = Request(
        model,
        out or Path("runs/reproduce") / name,
        recipe or ("demo" if model == "small" else "large"),
        suites,
        limit,
        samples,
        seed,
        steps,
        batch_size,
        scorer_batch,
        _scorers(scorer),
        prompts,
        calibration,
        kernel_off,
        rounds,
        device,
        dtype,
    )
    if prompts is None and set(request.chosen_suites) & set(PAPER_SUITES):
        from tritflow.calibration.prompt_sources import fetch

        fetch(on_file=lambda file, state: say(f"{state} {file.suite}/{file.name}") if state == "fetched" else None)
    outlook = way.outlook(request)
    if not json:
        _show(outlook)
    if plan:
        if json:
            print_json(outlook.to_dict())
        return
    if outlook.needs_consent and not yes:
        raise ReproductionError(
            f"not started: {outlook.total()}; add --yes to start, or --limit N to walk the way in small"
        )
    with progress("working", shown=not json) as bar:
        way.reproduce(request, report=lambda _, done, total: bar(done, total), say=say)
    rows, costs = way.summary(request), way.costs_line(request)
    page = request.out / "report" / "report.md"
    if json:
        print_json({"scores": rows, "costs": costs, "model": str(request.student), "report": str(page)})
        return
    _table("Reproduced", list(rows[0]), [list(row.values()) for row in rows], stderr=False)
    print(costs)
    print(page)


def _show(outlook: Any) -> None:
    _table("Plan", ["stage", "state", "pictures", "disk", "time"], [list(row.cells) for row in outlook.rows])
    say(outlook.total())


def _table(title: str, columns: list[str], rows: list[list[str]], stderr: bool = True) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(stderr=stderr)
    (console if console.is_terminal else Console(stderr=stderr, width=160)).print(table)
