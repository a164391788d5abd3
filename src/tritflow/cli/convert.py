"""`tritflow convert`: the same trits, packed another way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tritflow.cli.console import print_json, progress

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow convert OUT OUT-small --packing base3   # a fifth smaller on the disk, for shipping
  tritflow convert OUT-small OUT --packing 2bit    # the very same bytes again
"""


@app.command(epilog=_EXAMPLES)
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A ternary pipeline or transformer folder, hub id, or small-student.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    packing: Annotated[str, typer.Option("--packing", help="2bit, or base3 (five trits a byte).")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Write a ternary model again with its trits packed another way: lossless, verified, resumable."""
    import tritflow.models  # noqa: F401 - families register their tensors' shapes
    from tritflow.assets import ASSETS, asset_path
    from tritflow.config import TernaryConfig
    from tritflow.formats.accounting import account
    from tritflow.formats.repacking import convert_folder

    wanted = TernaryConfig.from_dict({"packing": packing}).packing
    with progress("repacking", shown=not json) as update:
        folder = convert_folder(asset_path(source) if source in ASSETS else source, out, wanted, progress=update)
    component = account(folder, read_data=False)[0]
    if json:
        print_json(component.summary())
        return
    print(f"{folder}: {wanted}, {component.file_bytes / 1e6:,.2f} MB, digest {component.digest}")
