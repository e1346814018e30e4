"""What the commands share: one-line errors, exit codes, JSON, and the options that say how data are loaded."""

from __future__ import annotations

import functools
import inspect
import json
import warnings
from collections.abc import Callable
from typing import Annotated, Any, TextIO

import typer

from mmc_fast.errors import InputError

BAD_INPUT, INTERRUPTED, FAILED = 2, 130, 1

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Jobs = Annotated[int, typer.Option(help="Processes with one thread each.")]

_DATA_OPTIONS: dict[str, Any] = {
    "task": Annotated[str | None, typer.Option(help="Which labels, for data with several tasks.")],
    "variant": Annotated[str | None, typer.Option(help="Which form of the data set, for sets with several.")],
    "nan_policy": Annotated[
        str | None, typer.Option(help="What happens to NaN in the data: error, mean or indicator.")
    ],
    "kind": Annotated[
        str | None,
        typer.Option(help="What the labels of a file are: classification, multilabel, regression or survival."),
    ],
    "split_seed": Annotated[int | None, typer.Option(help="Draw a split with this seed, for a file without one.")],
    "columns": Annotated[
        str | None, typer.Option(help="TOML file that says what the columns of tables are for (docs/guides/data.md).")
    ],
    "memory_budget": Annotated[
        str | None,
        typer.Option(help="Map the features of an npz file into memory where they exceed this, such as 2GB."),
    ],
}


def command(function: Callable[..., None]) -> Any:
    """The function as a command, with its parameters as options."""
    single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    single.command()(clean(function))
    return typer.main.get_command(single)


def clean(function: Callable[..., None]) -> Callable[..., None]:
    """Turn what a user can cause into one line on standard error and an exit code."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                function(*args, **kwargs)
        except InputError as error:
            _stop(str(error), BAD_INPUT)
        except OSError as error:
            reason = error.strerror or str(error)
            _stop(f"{error.filename or 'file'}: {reason}; check the path and your permissions", BAD_INPUT)
        except KeyboardInterrupt as error:
            _stop(str(error) or "interrupted", INTERRUPTED)
        except RuntimeError as error:
            if type(error).__module__.startswith("mmc_fast"):
                _stop(str(error), FAILED)  # such as a run whose loss became NaN
            raise

    return wrapped


def takes_data_options(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options of :func:`mmc_fast.experiments.data.load`; the function gets those that were given as ``options``."""
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "options"]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
        for name, annotation in _DATA_OPTIONS.items()
    ]

    def wrapped(**kwargs: Any) -> None:
        given = {name: kwargs.pop(name) for name in _DATA_OPTIONS}
        function(**kwargs, options={name: value for name, value in given.items() if value is not None})

    wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
    wrapped.__signature__ = inspect.Signature([*own, *more])  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in (*own, *more)}
    return wrapped


def print_json(value: Any) -> None:
    """Plain values on standard output."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def say(message: str) -> None:
    """One line on standard error."""
    typer.echo(f"mmc-fast: {' '.join(message.split())}", err=True)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    say(f"warning: {message}")


def _stop(message: str, code: int) -> None:
    say(message)
    raise typer.Exit(code)
