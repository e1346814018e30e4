"""Calls of the command line in this process."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from mmc_fast.cli import app

__all__ = ["run"]


def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Standard output and error of one call in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr
