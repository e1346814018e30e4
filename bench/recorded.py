"""The ratios that were recorded, by processor class: ``bench/recorded.csv``, one line each, beside the machine's name."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

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


def read(path: Path | None = None) -> dict[tuple[str, str, str, str], Entry]:
    """All entries by (processor class, bench, row, ratio). Raises ``ValueError`` where two share a key."""
    path = path or TABLE
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        entries = [Entry(**{**line, "value": float(line["value"])}) for line in csv.DictReader(file)]  # type: ignore[arg-type]
    found = {entry.key: entry for entry in entries}
    if len(found) < len(entries):
        twice = next(e.key for e in entries if sum(o.key == e.key for o in entries) > 1)
        raise ValueError(f"{path.name}: {' / '.join(twice)} stands there twice; leave one line")
    return found


def write(entries: Iterable[Entry], path: Path | None = None) -> None:
    """Put entries into the table, each in the place of an older one of its key; the others stay as they are."""
    path = path or TABLE
    new = {e.key: replace(e, value=float(f"{e.value:.3g}")) for e in entries}
    kept = read(path) | new
    half = path.with_suffix(".new")
    with half.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Entry)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(kept[key]) for key in kept)
    os.replace(half, path)
