"""``mmc-fast predict``: a finished run on rows without labels, and how far they are from its training data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mmc_fast._util.atomic import save_errors
from mmc_fast._util.files import write_file
from mmc_fast.errors import InputError
from mmc_fast.experiments.training import load_run

from .base import AsJson, command, print_json, takes_data_options
from .terminal import output_console, print_table


@takes_data_options
def predict_command(
    run: Annotated[Path, typer.Option(help="Folder of a finished run.")],
    data: Annotated[str, typer.Option(help="The rows: a table or npz file, a folder of tables, or a data set.")],
    out: Annotated[
        Path | None, typer.Option(help="File for the predictions, .csv or .parquet. (default: shown only)")
    ] = None,
    options: dict[str, Any] = {},  # noqa: B006
    as_json: AsJson = False,
) -> None:
    """Apply a finished run to rows without labels, and show how far they are from its training data."""
    if out is not None and out.suffix not in (".csv", ".parquet"):
        raise InputError(f"--out {out}: predictions are written as .csv or .parquet; change the ending")
    found = load_run(run).predict(data, **options)
    table = found.table()
    if out is not None:
        with save_errors(out, lambda: "nothing was written"):
            out.parent.mkdir(parents=True, exist_ok=True)
            if out.suffix == ".csv":
                write_file(out, lambda path: table.to_csv(path, index=False))
            else:
                write_file(out, lambda path: table.to_parquet(path, index=False))
    if as_json:
        about: dict[str, Any] = {
            "run": str(run),
            "data": data,
            "out": None if out is None else str(out),
            "rows": len(table),
        }
        about |= {"task": found.task.to_dict(), "differences": found.differences, "shift": found.shift}
        print_json(about | ({} if out is not None else {"predictions": table.to_dict("records")}))
        return
    for line in found.report():
        typer.echo(line, err=True)
    if out is not None:
        typer.echo(f"{len(table)} predictions: {out}")
        return
    shown = [[x if isinstance(x, str) else f"{x:.4g}" for x in row] for row in table.head(20).itertuples(index=False)]
    print_table(output_console(), f"The first {len(shown)} of {len(table)} rows", list(table.columns), shown)


COMMAND = command(predict_command)
