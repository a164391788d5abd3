"""`tritflow report`: tables, figures and a gallery from results; keeps the tables in pages up to date."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    paths: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[PATHS]...",
            help="Results (.json), folders of results or pictures, and pages (.md or folders of them).",
            show_default=False,
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write tables, figures, grid and gallery here.")] = None,
    curve: Annotated[
        Path | None, typer.Option(help="Draw the score while the small FLUX was trained here (.svg or .png).")
    ] = None,
    update: Annotated[bool, typer.Option("--update", help="Fill the table blocks of the pages given.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail when a page's table is stale; write nothing.")] = False,
) -> None:
    """Turn results into tables and figures. Results default to benchmarks/results, pages to README.md and docs.

    \b
    tritflow report                                   # tables on the terminal
    tritflow report runs/eval/scenes-480x4-seed0 --out report
    tritflow report --update README.md docs
    tritflow report --curve docs/images/training-curve.png
    tritflow report --check
    """
    from tritflow.cli.console import say
    from tritflow.report.build import tables_with_results, write_curve, write_report
    from tritflow.report.pages import stale_pages
    from tritflow.report.pages import update as update_pages
    from tritflow.report.sources import ReportError, collect
    from tritflow.report.tables import load_specs

    sources = collect(paths or [])
    if not sources.runs and not sources.pictures:
        default = Path("benchmarks/results")
        if not default.is_dir():
            raise ReportError(f"no results were given and there is no {default} here; name a results file or folder")
        if any(default.glob("*.json")):
            sources.runs = collect([default]).runs
    if update or check:
        if not sources.pages:
            sources.pages = collect([p for p in (Path("README.md"), Path("docs")) if _has_pages(p)]).pages
        if not sources.pages:
            raise ReportError("no page to fill: name .md files or a folder of them")
    if check:
        stale = stale_pages(sources.pages, load_specs(), sources.runs)
        for page in stale:
            say(f"stale: {page}; run `tritflow report --update {page}`")
        if stale:
            raise typer.Exit(1)
    elif update:
        changed = update_pages(sources.pages, load_specs(), sources.runs)
        say(f"{len(changed)} of {len(sources.pages)} pages changed" + "".join(f"\n  {p}" for p in changed))
    if curve is not None:
        typer.echo(write_curve(sources, curve))
    if out is not None:
        for path in write_report(sources, out):
            typer.echo(path)
    elif not (update or check or curve):
        tables = tables_with_results(sources)
        if not tables:
            raise ReportError("no table has results yet")
        for spec, body in tables:
            typer.echo(f"## {spec.title or spec.name}\n\n{body}\n")


def _has_pages(path: Path) -> bool:
    return path.is_file() or (path.is_dir() and any(path.rglob("*.md")))
