"""`tritflow push`: a ternary folder onto the hub, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli import options as o
from tritflow.cli.console import print_json, say

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow push OUT me/flux-ternary --dry-run                  # writes the card, lists the files
  tritflow push OUT me/flux-ternary --base-model black-forest-labs/FLUX.1-dev --results runs/geneval/results.json
"""


@app.command(epilog=_EXAMPLES)
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What `quantize` wrote.")],
    repo_id: Annotated[str, typer.Argument(metavar="REPO_ID", help="OWNER/NAME on the hub; made if need be.")],
    base_model: Annotated[str | None, typer.Option(help="Hub id of the model it was made from.")] = None,
    license: Annotated[
        str | None, typer.Option(help="The base model's, where neither its card nor its architecture tells.")
    ] = None,
    results: Annotated[
        list[Path] | None, typer.Option(help="Results file with evaluations of this model; repeatable.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="If the repository is new.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the card and list the files; upload nothing.")
    ] = False,
    json: o.Json = False,
) -> None:
    """Check every byte, write README.md (a model card with the base model's licence), and upload."""
    from tritflow.hub.push import prepare
    from tritflow.hub.push import push as upload
    from tritflow.report.formats import size

    package = prepare(folder, repo_id, base_model=base_model, license=license, results=results or ())
    if not json:
        for file in package.files:
            say(f"{size(file.size):>10}  {file.path}")
        for name in package.left_out:
            say(f"{'left out':>10}  {name}")
        total = size(sum(f.size for f in package.files))
        say(f"{len(package.files)} files, {total}; licence {package.licence} ({package.licence.found})")
    address = None if dry_run else upload(package, private=private)
    if json:
        files = {file.path: file.size for file in package.files}
        print_json({"repo_id": repo_id, "licence": str(package.licence), "files": files, "address": address})
    else:
        print(address or folder / "README.md")
