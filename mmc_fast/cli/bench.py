"""``mmc-fast bench``: the speed of the AGOP core on this processor, or of both ops on a GPU."""

from __future__ import annotations

from typing import Annotated

import typer

from mmc_fast.ops import selftest as cpu

from .base import AsJson, command, print_json
from .device import gpu


def bench(
    device: Annotated[str, typer.Option(help="cpu, or cuda (cuda:N) for both ops on a GPU, as JSON.")] = "cpu",
    as_json: AsJson = False,
) -> None:
    """Time the AGOP core on this machine against the forward product (CPU, one thread, a few seconds)."""
    if device != "cpu":
        from .device_bench import device_bench

        print_json(device_bench(gpu("bench", device)))
        return
    speeds = cpu.quick_bench()
    if as_json:
        print_json([vars(s) | {"ratio": s.ratio} for s in speeds])
        return
    for s in speeds:
        typer.echo(f"{s.name} ({s.shape}) on {s.isa}: {s.milliseconds:.2f} ms, {s.ratio:.2f} x the forward product")


COMMAND = command(bench)
