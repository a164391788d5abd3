"""`tritflow prompts`: the prompt suites, fetched from their projects and held to pinned checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tritflow.cli import options as o
from tritflow.cli.console import print_json, say

app = typer.Typer(rich_markup_mode=None, no_args_is_help=True)

_EXAMPLES = """Examples:

\b
  tritflow prompts fetch                    # into the cache, each file held to its SHA-256
  tritflow prompts list
  tritflow prompts show paper --limit 5     # the 7,232 calibration prompts
  tritflow prompts show my_prompts.txt --json
  tritflow prompts show t2i_compbench --split val --against paper   # what was trained on
"""

_Folder = Annotated[
    Path | None, typer.Option("--folder", help="Where the files lie. Default: tritflow's cache folder.")
]


@app.callback(epilog=_EXAMPLES)
def prompts() -> None:
    """Fetch, list and show the prompt suites. Only prompts are used for calibration, never an image."""


@app.command()
def fetch(folder: _Folder = None) -> None:
    """Download what is missing: PartiPrompts, T2I-CompBench and GenEval, from their own projects."""
    from tritflow.calibration.prompt_sources import fetch as run

    where = run(folder, on_file=lambda file, state: say(f"{state:8} {file.suite}/{file.name}"))
    print(where)


@app.command("list")
def list_(folder: _Folder = None, json: o.Json = False) -> None:
    """Every file with its project, licence, number of prompts, and whether it is here."""
    from tritflow.calibration.prompt_sources import FILES, PromptsError, prompts_folder

    where = folder or prompts_folder()
    rows = []
    for file in FILES:
        try:
            file.read(where)
            state = "present"
        except PromptsError:
            state = "damaged" if file.at(where).exists() else "missing"
        rows.append((file, state))
    if json:
        print_json(
            [
                {
                    "file": f"{f.suite}/{f.name}",
                    "project": f.project,
                    "commit": f.commit,
                    "sha256": f.sha256,
                    "licence": f.licence,
                    "prompts": f.prompts,
                    "state": state,
                }
                for f, state in rows
            ]
        )
        return
    for f, state in rows:
        print(f"{state:8} {f.suite + '/' + f.name:38} {f.prompts:5}  {f.project} ({f.licence})")
    say(f"folder: {where}")


@app.command()
def show(
    source: Annotated[
        str,
        typer.Argument(help="paper, partiprompts, t2i_compbench, geneval, or a .txt / .jsonl / folder of prompts."),
    ],
    limit: Annotated[int, typer.Option("--limit", min=0, help="How many prompts to print (0: all).")] = 0,
    against: Annotated[
        str | None, typer.Option("--against", help="Also list the prompts shared with this other source.")
    ] = None,
    split: Annotated[str | None, typer.Option("--split", help="Only this split: train, val or test.")] = None,
    category: Annotated[str | None, typer.Option("--category", help="Only this category or tag.")] = None,
    folder: _Folder = None,
    json: o.Json = False,
) -> None:
    """Print a prompt set with its counts and hash."""
    from tritflow.calibration.prompt_sources import PromptsError
    from tritflow.calibration.prompts import overlap

    whole = _open(source, folder)
    found = whole.select(split=split, category=category)
    if not len(found):
        splits, categories = ({getattr(p, key) for p in whole} - {""} for key in ("split", "category"))
        raise PromptsError(
            f"{source} has no such prompts (splits: {', '.join(sorted(splits))}; "
            f"categories: {', '.join(sorted(categories)) or 'none'})"
        )
    shared = overlap(found, _open(against, folder)) if against is not None else None
    chosen = found.prompts[: limit or None]
    if json:
        data = found.describe() | {"prompts": [p.text for p in chosen]}
        print_json(data if shared is None else data | {"overlap": shared})
        return
    for prompt in chosen:
        print(prompt.text)
    counts = ", ".join(f"{name} {count}" for name, count in found.counts.items())
    say(f"{len(found)} prompts ({counts}), sha256 {found.sha256}")
    if shared is not None:
        shown = shared[: limit or None]
        say(f"{len(shared)} shared with {against}" + "".join(f"\n  {text}" for text in shown))


def _open(source: str, folder: Path | None) -> Any:
    from tritflow.calibration.prompts import load_prompts, suite_prompts

    if Path(source).exists() or source.endswith((".txt", ".jsonl")):
        return load_prompts(source)
    return suite_prompts(source, folder)
