"""Calls of the command line in this process."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
from typer.testing import CliRunner

from mmc_fast.cli import app
from mmc_fast.cli.schemas import schema

__all__ = ["run"]


def run(*arguments: str | Path, code: int = 0) -> tuple[str, str]:
    """Standard output and error of one call in this process."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    if code == 0 and "--json" in arguments:
        name = " ".join(arguments[: 2 if arguments[0] == "data" else 1])
        jsonschema.validate(json.loads(result.stdout), schema(name))  # whatever a test asks for is what is documented
    return result.stdout, result.stderr
