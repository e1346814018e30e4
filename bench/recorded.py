"""Tables of what was recorded, by processor class, beside the machine's name; ``bench/recorded.csv`` holds the ratios."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("recorded.csv")


@dataclass(frozen=True)
class Entry:
    """One recorded ratio; ``processors`` is the class it holds for, ``machine`` and ``date`` say where and when."""

    processors: str
    bench: str
    row: str
    ratio: str
    value: float
    machine: str
    date: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.processors, self.bench, self.row, self.ratio


def read(path: Path | None = None, kind: type[Any] = Entry) -> dict[tuple[str, ...], Any]:
    """All entries of a table by their key. Raises ``ValueError`` where two share one."""
    path = path or TABLE
    if not path.exists():
        return {}
    numbers = {f.name for f in fields(kind) if f.type != "str"}  # an empty field: not measured
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    entries = [kind(**{k: (float(v) if v else None) if k in numbers else v for k, v in line.items()}) for line in lines]
    found = {entry.key: entry for entry in entries}
    if len(found) < len(entries):
        twice = next(e.key for e in entries if sum(o.key == e.key for o in entries) > 1)
        raise ValueError(f"{path.name}: {' / '.join(twice)} stands there twice; leave one line")
    return found


def write(entries: Iterable[Any], path: Path | None = None, kind: type[Any] = Entry, digits: int = 3) -> None:
    """Put entries into a table, each in the place of an older one of its key; the others stay as they are."""
    path = path or TABLE

    def cell(value: object) -> object:
        return f"{value:.{digits}g}" if isinstance(value, float) else value

    lines = [{k: cell(v) for k, v in asdict(e).items()} for e in entries]
    new = {kind(**line).key: line for line in lines}
    kept = {key: asdict(entry) for key, entry in read(path, kind).items()} | new
    half = path.with_suffix(".new")
    with half.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(kind)], lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: cell(v) for k, v in line.items()} for line in kept.values())
    os.replace(half, path)
