"""The commands ``mmc-fast data``: which sets there are, making them from the publishers' files, and checking them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmc_fast._env import env
from mmc_fast.experiments.data import available
from mmc_fast.experiments.data import prepare as builders

from .base import AsJson, clean, print_json
from .terminal import PassDisplay, error_console, output_console, print_table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the npz files. (default: MMC_DATA, else ./data)")]


def _folder(out: Path | None) -> Path:
    return out if out is not None else Path(env("MMC_DATA") or "data")


def _rows() -> list[dict[str, Any]]:
    return [
        {
            "name": info.name,
            "found": info.found,
            "what": info.title,
            "licence": info.licence,
            "get": builders.RECIPES[info.name].where,
        }
        for info in available()
    ]


@app.command("list", epilog="Example: mmc-fast data list --json")
@clean
def list_sets(as_json: AsJson = False) -> None:
    """Show every data set: whether it is here, what it is, its licence, and where its originals are published."""
    found = _rows()
    if as_json:
        print_json(found)
        return
    table = [[row["name"], "yes" if row["found"] else "no", row["what"], row["licence"]] for row in found]
    print_table(output_console(), "Data sets", ["name", "here", "what", "licence"], table, numbers=False)
    for row in found:
        typer.echo(f"{row['name']}: {row['get']}")


@app.command(epilog="Example: mmc-fast data prepare p2012 --from ~/Downloads --out ~/mmc-data")
@clean
def prepare(
    name: Annotated[str, typer.Argument(help="Data set, see `mmc-fast data list`.")],
    originals: Annotated[
        list[Path], typer.Option("--from", help="Folder with the publisher's files, as downloaded; repeatable.")
    ],
    out: Out = None,
    unverified: Annotated[
        bool, typer.Option("--unverified", help="Take originals of another release, or a part of them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make NAME.npz from the publisher's files; the same files give the same bytes."""
    folder = _folder(out)
    with PassDisplay(error_console()) as display:
        path = builders.prepare(name, originals, folder, verify=not unverified, progress=display)
    state = builders.check(name, folder)
    if as_json:
        print_json({"name": name, "path": str(path), "bytes": path.stat().st_size, "state": state})
        return
    typer.echo(f"{path}: {state}, {path.stat().st_size:,} bytes")
    given = env("MMC_DATA")
    if given is None or Path(given).resolve() != folder.resolve():
        typer.echo(f"To use it: export MMC_DATA={folder.resolve()}")


@app.command(epilog="Example: mmc-fast data check p2012")
@clean
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets (default: all).")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Read the npz files that are here and compare them with their check sums; exit code 1 where one is damaged or absent.

    Without names, absent sets do not count.
    """
    states = {name: builders.check(name, _folder(out)) for name in names or builders.RECIPES}
    if as_json:
        print_json(states)
    else:
        for name, state in states.items():
            typer.echo(f"{name}: {state}")
    if any(not state.startswith(("whole", "readable")) and (names or state != "not here") for state in states.values()):
        raise typer.Exit(1)


COMMAND = typer.main.get_command(app)
