"""The commands ``mmc-fast data``: which sets there are, making them from the publishers' files, and checking them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mmc_fast._env import env

__all__ = ["app"]

app = typer.Typer(
    help="List the data sets, make one from its publisher's files, check those that are here.",
    no_args_is_help=True,
    add_completion=False,
)
Out = Annotated[Path | None, typer.Option("--out", help="Folder of the npz files. [default: MMC_DATA, else ./data]")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]


def _folder(out: Path | None) -> Path:
    return out if out is not None else Path(env("MMC_DATA") or "data")


def _json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _rows() -> list[dict[str, Any]]:
    from mmc_fast.experiments.data import available
    from mmc_fast.experiments.data.prepare import RECIPES

    return [
        {
            "name": info.name,
            "found": info.found,
            "what": info.title,
            "licence": info.licence,
            "get": RECIPES[info.name].where,
        }
        for info in available()
    ]


@app.command("list")
def list_sets(as_json: AsJson = False) -> None:
    """Show every data set: whether it is here, what it is, its licence, and where its originals are published."""
    from mmc_fast.cli.terminal import output_console, print_table

    found = _rows()
    if as_json:
        _json(found)
        return
    table = [[row["name"], "yes" if row["found"] else "no", row["what"], row["licence"]] for row in found]
    print_table(output_console(), "Data sets", ["name", "here", "what", "licence"], table, numbers=False)
    for row in found:
        typer.echo(f"{row['name']}: {row['get']}")


@app.command()
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
    from mmc_fast.cli.terminal import PassDisplay, error_console
    from mmc_fast.experiments.data.prepare import check
    from mmc_fast.experiments.data.prepare import prepare as make

    folder = _folder(out)
    with PassDisplay(error_console()) as display:
        path = make(name, originals, folder, verify=not unverified, progress=display)
    state = check(name, folder)
    if as_json:
        _json({"name": name, "path": str(path), "bytes": path.stat().st_size, "state": state})
        return
    typer.echo(f"{path}: {state}, {path.stat().st_size:,} bytes")
    given = env("MMC_DATA")
    if given is None or Path(given).resolve() != folder.resolve():
        typer.echo(f"To use it: export MMC_DATA={folder.resolve()}")


@app.command()
def check(
    names: Annotated[list[str] | None, typer.Argument(help="Data sets. [default: all]")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Read the npz files that are here and compare them with their check sums; exit code 1 where one is damaged or absent.

    Without names, absent sets do not count.
    """
    from mmc_fast.experiments.data.prepare import RECIPES
    from mmc_fast.experiments.data.prepare import check as check_one

    states = {name: check_one(name, _folder(out)) for name in names or RECIPES}
    if as_json:
        _json(states)
    else:
        for name, state in states.items():
            typer.echo(f"{name}: {state}")
    if any(not state.startswith(("whole", "readable")) and (names or state != "not here") for state in states.values()):
        raise typer.Exit(1)
