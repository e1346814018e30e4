"""``mmc-fast selftest``: every native kernel of this machine, or of a GPU, against float64."""

from __future__ import annotations

from typing import Annotated

import typer

from mmc_fast.ops import selftest as cpu

from .base import AsJson, command, print_json
from .device import gpu


def selftest(
    device: Annotated[str, typer.Option(help="cpu, or cuda (cuda:N) for the kernels of a GPU.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Check every native kernel on every instruction set of this machine; exit code 1 where one is wrong."""
    if device == "cpu":
        checks = cpu.selftest()
    else:
        from .device_selftest import device_selftest

        checks = device_selftest(gpu("selftest", device))
    if as_json:
        print_json([{"name": c.name, "passed": c.passed, "detail": c.detail} for c in checks])
    else:
        for check in checks:
            typer.echo(f"{'ok    ' if check.passed else 'FAILED'}  {check.name}: {check.detail}")
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


COMMAND = command(selftest)
