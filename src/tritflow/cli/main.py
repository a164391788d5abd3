"""The `tritflow` command. Each verb lives in its own file and is imported only when it is used.

A verb's file defines `app`, a `typer.Typer` with one command (or several), or a function of the verb's name.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tritflow.cli.console import INTERRUPTED, explain, say, share_the_cores, show_warnings_as_notes

VERBS = {
    "generate": "Draw pictures from prompts.",
    "compare": "Draw the same prompts with several models, side by side.",
    "quantize": "Turn a FLUX checkpoint into a ternary one.",
    "evaluate": "Score a model on a task.",
    "inspect": "Verify a ternary checkpoint and account for its bytes.",
    "convert": "Repack a ternary checkpoint without loss.",
    "prompts": "Fetch and check the calibration prompts.",
    "report": "Turn results into tables and figures.",
    "bench": "Measure kernels, latency, memory and storage.",
    "reproduce": "From a dense FLUX folder to the paper's tables, in stages.",
    "push": "Upload a ternary folder to the hub with a model card.",
    "demo": "Quantize the built-in model, draw with it and score it.",
}


def _available(verb: str) -> bool:
    return importlib.util.find_spec(f"tritflow.cli.{verb}") is not None


def _load(verb: str) -> Any:
    """The real command behind a verb."""
    module = importlib.import_module(f"tritflow.cli.{verb}")
    app = getattr(module, "app", None)
    if not isinstance(app, typer.Typer):
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(verb)(getattr(module, verb))
    app._add_completion = False  # the option belongs to `tritflow` alone
    command = typer.main.get_command(app)
    command.name = verb
    return command


class _Group(TyperGroup):
    """Swaps a verb's placeholder for the real command when it is called, and turns errors into one line."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in self.commands:
            self.commands[args[0]] = _load(args[0])
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (Exception, KeyboardInterrupt) as error:
            # typer's own exceptions (usage, exit, abort) are its business, whichever click it carries.
            family = [base.__module__.partition(".")[0] for base in type(error).__mro__]
            if "typer" in family or "click" in family or (ctx.params.get("debug") and _is_fault(error)):
                raise
            message, code = explain(error)
            say(message if code == INTERRUPTED else f"error: {message}")
            raise typer.Exit(code) from None


def _is_fault(error: BaseException) -> bool:
    return not isinstance(error, KeyboardInterrupt)


app = typer.Typer(
    cls=_Group,
    help="FLUX-class text-to-image models at 1.58 bits: quantize, run, measure.",
    epilog="`tritflow VERB --help` shows a verb's options and examples. Exit codes: 0 done, 1 failed, "
    "2 wrong usage or input, 3 device or memory missing, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(value: bool) -> None:
    if value:
        from tritflow import __version__

        typer.echo(f"tritflow {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the libraries' logs.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    share_the_cores()
    if not debug:
        # Read by the libraries when they are imported, which is after this line.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
        show_warnings_as_notes()


def _placeholder() -> None:
    raise AssertionError("replaced by the real command before it is called")


for _verb, _summary in VERBS.items():
    if _available(_verb):
        app.command(_verb, help=_summary)(_placeholder)


def main() -> None:
    """Entry point of the `tritflow` script."""
    try:
        app()
    except BrokenPipeError:
        # The reader went away (`tritflow ... | head`): nothing is wrong, and nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
