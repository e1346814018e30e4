"""The command line ``mmc-fast``: one file a command, imported when it is called; ``--help`` needs typer alone."""

from __future__ import annotations

import io
import sys
from importlib import import_module
from typing import Annotated, Any

from mmc_fast import __version__
from mmc_fast._util.extras import MissingExtra

try:
    import typer
    from typer.core import TyperCommand, TyperGroup
except ModuleNotFoundError as error:
    print(f"mmc-fast: the command line needs {error.name}: pip install 'mmc-fast[cli]'", file=sys.stderr)
    raise SystemExit(2) from error

from .base import BAD_INPUT, say

__all__ = ["app", "main"]

COMMANDS = {
    "demo": (
        "Train vanilla, modality dropout, KD and two forms of EBR on two data sets; write a report.",
        "experiments",
    ),
    "train": ("Train one model, select its best epoch and score it on test data.", "experiments"),
    "evaluate": ("Score a finished run on complete data and at missing rates.", "experiments"),
    "predict": ("Apply a finished run to rows without labels, and show how far they are from its data.", "experiments"),
    "diagnose": ("Show which modality a model uses, which it lost, and why.", "diagnose"),
    "compare": ("Compare methods with equal budgets and searches.", "experiments"),
    "reproduce": ("Repeat an experiment of the paper on open data.", "experiments"),
    "data": ("List the data sets, make one from its publisher's files, check those that are here.", "experiments"),
    "info": ("Show versions, hardware, the native library, data sets and environment variables.", "cli"),
    "selftest": ("Check every native kernel on every instruction set of this machine.", "cli"),
    "bench": ("Time the AGOP core on this machine, or both ops on a GPU.", "cli"),
    "tune": ("Measure both ops on a GPU and store which backend auto takes there.", "cli"),
}
"""Command, which is the file of this package that defines it as ``COMMAND`` -> its line in ``--help``, and the extra that
brings what it needs."""


EXAMPLES = {
    "demo": "mmc-fast demo --open",
    "train": "mmc-fast train --data patients.csv --split-seed 0 --method dropout",
    "evaluate": "mmc-fast evaluate --run runs/mfeat-dropout-0 --rates 0.1,0.5",
    "predict": "mmc-fast predict --run runs/mfeat-dropout-0 --data new.csv --out predictions.csv",
    "diagnose": "mmc-fast diagnose --run runs/mfeat-dropout-0 --html page.html",
    "compare": "mmc-fast compare --methods vanilla,dropout,ebr-robust --data mfeat --seeds 3",
    "reproduce": "mmc-fast reproduce table6 --seeds 3",
    "data": "mmc-fast data prepare p2012 --from ~/Downloads --out ~/mmc-data",
    "info": "mmc-fast info --json",
    "selftest": "mmc-fast selftest",
    "bench": "mmc-fast bench --json",
    "tune": "mmc-fast tune --device cuda",
}
"""Shown at the end of the help of each command."""


class _Lazy(TyperGroup):
    """Lists commands by their lines alone and imports the one that is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name][0]) if cmd_name in COMMANDS else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, _, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)), rest


def load_command(name: str) -> Any:
    """The command as its file defines it; one line and an exit where a package is missing."""
    try:
        found = import_module(f"{__name__}.{name}").COMMAND
        found.epilog = f"Example: {EXAMPLES[name]}"
        return found
    except MissingExtra as error:
        say(f"{name}: {error}")
        raise typer.Exit(BAD_INPUT) from error
    except ModuleNotFoundError as error:
        package = (error.name or "mmc_fast").partition(".")[0]
        if package == "mmc_fast":
            raise
        say(f"{name}: {package} is not installed; run: pip install 'mmc-fast[{COMMANDS[name][1]}]'")
        raise typer.Exit(BAD_INPUT) from error


app = typer.Typer(
    name="mmc-fast",
    cls=_Lazy,
    help="Explicit basis reallocation and modality-collapse diagnosis for PyTorch.",
    no_args_is_help=True,
    epilog="Example: mmc-fast demo --quick --open. Completion of your shell: mmc-fast --install-completion",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    app()


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmc-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
