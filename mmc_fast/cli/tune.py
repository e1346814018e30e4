"""``mmc-fast tune``: time both ops on a GPU and store which backend ``auto`` takes there."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer

from mmc_fast.ops import measured

from .base import command, print_json
from .device import gpu
from .device_bench import PRECISIONS, SHAPES, Shape, measure


def tune_device(device: torch.device, name: str, shapes: tuple[Shape, ...] = SHAPES) -> dict[str, Any]:
    """Eager, compiled, graphs and ours on every shape, each compared with eager before it is timed; writes the table."""
    rows = [
        measure(device, shape, precision)
        for shape in shapes
        for precision in (PRECISIONS if shape.psi else ("float32",))
    ]
    table = measured.table(rows)
    return {"device": name, "file": str(measured.write(name, table)), "rows": table}


def tune(device: Annotated[str, typer.Option(help="cuda, or cuda:N.")] = "cuda") -> None:
    """Measure eager, compiled, CUDA graphs and our kernels on a GPU, and store the faster backend for auto; a few minutes."""
    where = gpu("tune", device)
    print_json(tune_device(where, torch.cuda.get_device_name(where)))


COMMAND = command(tune)
