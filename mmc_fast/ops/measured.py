"""Which backend was faster on a class of GPUs: the table that ``mmc-fast tune --device cuda`` writes and ``auto`` reads.

One JSON file per name of a device in the user's cache folder. A row: ``op``, ``precision``, ``shape`` (its ``batch`` counts), ``ms``
by side, ``problem`` and ``backend``, the faster one where all is right. ``auto`` takes the row of the nearest batch size.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.atomic import write_json

_KEYS = ("op", "shape", "precision", "problem")


def table(rows: Sequence[Mapping[str, Any]], right: bool = True, backend: str = "triton") -> list[dict[str, Any]]:
    """Rows of measurements as rows of the table: ``backend`` where it beats eager both by plain calls and by CUDA graphs, if
    both were timed, and nothing is wrong; else eager."""
    found = []
    for row in rows:
        ms = {name: side["ms"] for name, side in row["sides"].items() if "ms" in side}
        pairs = [(f"ours{how}", f"eager{how}") for how in ("", ", CUDA graph")]
        both = [ms[a] < ms[b] for a, b in pairs if a in ms and b in ms]
        wins = bool(both) and all(both) and right and row["problem"] is None
        found.append({key: row.get(key) for key in _KEYS} | {"ms": ms, "backend": backend if wins else "eager"})
    return found


def path(device_name: str) -> Path:
    """Where the table of a device of this name lies."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return folder / "mmc-fast" / f"gpu-{hashlib.sha256(device_name.encode()).hexdigest()[:16]}.json"


def write(device_name: str, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Store the rows of a device of this name; returns the file. ``auto`` takes them from the next call on."""
    to = path(device_name)
    to.parent.mkdir(parents=True, exist_ok=True)
    write_json(to, {"device": device_name, "torch": torch.__version__, "rows": list(rows)})
    read.cache_clear()
    return to


@lru_cache(maxsize=16)
def read(device_name: str) -> tuple[Mapping[str, Any], ...]:
    """The rows of a device of this name; none where there is no file, or one of another device or torch."""
    try:
        found = json.loads(path(device_name).read_text(encoding="utf-8"))
        rows = tuple(row for row in found["rows"] if row["problem"] is None and row["shape"]["batch"] > 0)
        sound = all(row["backend"] in ("triton", "eager") and row["ms"] for row in rows)
        return rows if sound and (found["device"], found["torch"]) == (device_name, torch.__version__) else ()
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return ()


@lru_cache(maxsize=16)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device)


def _row(op: str, like: Tensor) -> Mapping[str, Any] | None:
    allowed = like.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    precision = "tf32" if allowed else "float32" if like.dtype == torch.float32 else "bfloat16"
    kinds = (precision, "float32") if op == "agop" else (precision,)  # AGOP is timed in float32 alone
    rows = [row for row in read(_name(like.device)) if row["op"] == op and row["precision"] in kinds]
    batch = max(1, like.shape[0])
    return min(rows, key=lambda row: abs(log(row["shape"]["batch"] / batch)), default=None)


def faster(op: str, like: Tensor | None) -> str | None:
    """The backend that a table says is faster for this op ("ebr_step", "agop") on the device of ``like``; None without a row."""
    if like is None or not like.is_cuda or torch.compiler.is_compiling():
        return None
    row = _row(op, like)
    return None if row is None else str(row["backend"])


def note(op: str, like: Tensor | None) -> str:
    """What :func:`mmc_fast.explain` says about the Triton backend of an op."""
    row = _row(op, like) if like is not None and like.is_cuda else None
    if row is None:
        return "not measured on this device"
    return "measured on this device: " + ", ".join(f"{side} {ms:.3g} ms" for side, ms in row["ms"].items())
