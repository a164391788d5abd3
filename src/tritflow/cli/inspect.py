"""`tritflow inspect`: verify a checkpoint and account for its bytes; `--env` shows what this machine can run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tritflow.cli.console import print_json, say

if TYPE_CHECKING:
    from tritflow.formats.accounting import Component, Layer

app = typer.Typer(rich_markup_mode=None)

_EXAMPLES = """Examples:

\b
  tritflow inspect OUT                  # verify every byte, sizes by kind of layer
  tritflow inspect OUT --layers --json  # one entry a layer
  tritflow inspect FLUX_DIR             # dense models and single files too
  tritflow inspect --env
"""


@app.command(epilog=_EXAMPLES)
def inspect(
    path: Annotated[
        str | None,
        typer.Argument(help="A model folder, single file or hub id, or the built-in small / small-student."),
    ] = None,
    layers: Annotated[bool, typer.Option("--layers", help="One row a layer, not one a kind of layer.")] = False,
    headers: Annotated[bool, typer.Option("--headers", help="Read headers only: verify and count nothing.")] = False,
    env: Annotated[bool, typer.Option("--env", help="Show versions, device and usable kernels.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
) -> None:
    """Verify a ternary checkpoint byte by byte, and show what each layer takes: bytes, bits a weight, trits.

    Exits with 2, naming the tensor, when the checkpoint is damaged.
    """
    if env:
        from tritflow.formats.environment import environment

        _show_environment(environment() | _kernels(), json)
        if path is None:
            return
    if path is None:
        raise typer.BadParameter("give a model to inspect, or --env")
    import tritflow.models  # noqa: F401 - families register their tensors' shapes
    from tritflow.assets import ASSETS, asset_path
    from tritflow.formats.accounting import account

    components = account(asset_path(path) if path in ASSETS else path, read_data=not headers)
    if json:
        print_json([c.to_dict() if layers else c.summary() for c in components])
        return
    for component in components:
        _show(component, layers)
    if any(c.digest for c in components) and not headers:
        say("every tensor matches its checksum and the digest")


def _kernels() -> dict[str, str]:
    """What the kernels say about themselves; a broken kernel stack must not hide the rest of the account."""
    try:
        from tritflow import kernels

        return dict(kernels.describe())
    except Exception as error:
        return {"kernels": f"unknown ({type(error).__name__}: {error})"}


def _show_environment(facts: dict[str, str], json: bool) -> None:
    if json:
        print_json(facts)
        return
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {value}")


def _show(component: Component, all_layers: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{component.name}  ({component.path})", title_justify="left")
    for column in ("layer", "n", "shape", "kind", "MB", "bits/param", "-1", "0", "+1"):
        table.add_column(column, justify="left" if column in ("layer", "kind") else "right", no_wrap=True)
    for name, group in _groups(component.layers, all_layers).items():
        table.add_row(*_row(name, group))
    console = Console()
    # Piped output has no width of its own; names cut short would be of no use there.
    (console if console.is_terminal else Console(width=160)).print(table)
    print(_totals(component.summary()))


def _groups(layers: list[Layer], all_layers: bool) -> dict[str, list[Layer]]:
    """Layers that differ only in their number form one row."""
    groups: dict[str, list[Layer]] = {}
    for layer in layers:
        name = layer.name if all_layers else re.sub(r"(?<=\.)\d+(?=\.)", "*", layer.name, count=1)
        groups.setdefault(name, []).append(layer)
    return groups


def _row(name: str, group: list[Layer]) -> list[str]:
    first, nbytes = group[0], sum(layer.nbytes for layer in group)
    counts = [layer.trits for layer in group if layer.trits]
    total = sum(map(sum, counts))
    shares = [f"{sum(c[i] for c in counts) / total:.1%}" for i in range(3)] if total else ["", "", ""]
    bits = 8 * nbytes / max(1, sum(layer.parameters for layer in group))
    shape = "x".join(map(str, first.shape))
    return [name, str(len(group)), shape, first.kind, f"{nbytes / 1e6:.3f}", f"{bits:.3f}", *shares]


def _totals(s: dict[str, Any]) -> str:
    line = (
        f"{s['parameters']:,} parameters in {s['file_bytes'] / 1e6:,.2f} MB: {s['bits_per_parameter']:.3f} bits a "
        f"parameter, {s['ratio_to_bf16']:.2f}x smaller than bf16 ({s['bf16_bytes'] / 1e6:,.2f} MB)"
    )
    if s["ternary_layers"]:
        line += (
            f"\n{s['ternary_layers']} ternary layers, {s['ternary_weights']:,} weights at "
            f"{s['bits_per_ternary_weight']:.3f} bits without scales, packed {s['settings']['packing']}"
        )
    return line + "\n"
