"""The grid of the performance page: every row with its processor, floor, and ratios against eager, compiled and stacked.

``python bench/grid.py``                    prints the table; rows that do not fit into ``--minutes`` are named
``python bench/grid.py --record``           and writes the rows of a quiet machine into bench/grid.csv and docs/results/processors.md
``python bench/grid.py --avx2``             library and torch both limited to AVX2 (a class of processors of its own)

The rows are those of ``bench_ebr.py`` and ``bench_agop.py``: correctness first, best CPU time of one thread of each
candidate in turn.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import recorded
import torch

TABLE = Path(__file__).with_name("grid.csv")
PAGE = Path(__file__).parents[1] / "docs" / "results" / "processors.md"
BEGIN, END = "<!-- grid: begin -->", "<!-- grid: end -->"
AVX2 = {
    "MMC_CPU_ISA": "avx2", "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2",
}  # fmt: skip
AGAINST = ("floor", "eager", "compiled", "stacked")
# candidates of a result by column; the floor of AGOP is the forward product, its "eager" the sum trick or torch's probe
VIEWS = {
    "ebr": {
        "": ("ours", "floor", "eager", "compiled", "stacked"),
        " bf16": ("ours_bf16", "floor_bf16", "autocast", "compiled_autocast", ""),
        " autocast": ("ours_autocast", "floor_bf16", "autocast", "compiled_autocast", "stacked_autocast"),
    },
    "agop": {
        "": ("ours", "forward", "sum_trick", "", ""),
        " one probe": ("ours_probe", "", "torch_probe", "", ""),
    },
}


@dataclass(frozen=True)
class Entry:
    """Milliseconds of one row on one machine; None for what was not measured."""

    processors: str  # class, as in recorded.csv
    machine: str
    date: str
    bench: str
    row: str
    products: str  # how the native step multiplied
    ours: float
    floor: float | None = None
    eager: float | None = None
    compiled: float | None = None
    stacked: float | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        return self.bench, self.row, self.processors


def read(path: Path = TABLE) -> list[Entry]:
    return list(recorded.read(path, Entry).values())


def write(entries: Iterable[Entry], path: Path = TABLE) -> None:
    """Put entries in the place of those of the same class and row."""
    recorded.write(entries, path, Entry, digits=4)


def entries_of(bench: str, result: dict, place: tuple[str, str, str], products: str) -> list[Entry]:
    """The lines of one result: float32, parameters in bfloat16, autocast; or AGOP and its probe."""
    times = result["milliseconds"]
    found = []
    for suffix, (ours, *others) in VIEWS[bench].items():
        if ours in times:
            rest = {column: times.get(name) for column, name in zip(AGAINST, others, strict=True)}
            found.append(Entry(*place, bench, result["row"] + suffix, products, times[ours], **rest))
    return found


def table(entries: Iterable[Entry]) -> str:
    """Markdown, one line a row and processor."""
    lines = [
        "| row | processor | ms | floor | ÷ floor | ÷ eager | ÷ compiled | ÷ stacked | products | date |",
        "|" + "---|" * 10,
    ]
    order = {"ebr": 0, "agop": 1}
    rows = list(dict.fromkeys((e.bench, e.row) for e in entries))
    for e in sorted(entries, key=lambda e: (order[e.bench], rows.index((e.bench, e.row)), e.processors)):
        ratios = [f"{e.ours / v:.2f}" if (v := getattr(e, name)) else "–" for name in AGAINST]
        floor = f"{e.floor:.3g}" if e.floor else "–"
        limits = " (AVX2 only)" if "MMC_CPU_ISA=avx2" in e.processors else ""
        cells = (f"`{e.row}`", e.machine + limits, f"{e.ours:.3g}", floor, *ratios, e.products, e.date)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page(text: str, entries: Iterable[Entry]) -> str:
    """The performance page with the grid of ``entries``."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(list(entries))}\n{rest[rest.index(END) :]}"


def measurements(compiled: bool) -> list[tuple[str, str, Callable[[], dict]]]:
    """(bench, row, what measures it), the most important first."""
    import bench_agop
    import bench_ebr

    named = {row.name: row for row in bench_ebr.ROWS}
    keep = ("ours", "ours_bf16", "ours_autocast", "eager", "compiled", "stacked", "autocast", "floor", "floor_bf16")
    found: list[tuple[str, str, Callable[[], dict]]] = []

    def ebr(row: bench_ebr.Row, *, may_compile: bool) -> None:
        names = tuple(n for n in row.candidates if n in keep or n.endswith("_autocast"))
        chosen = replace(row, candidates=names)
        if not (compiled and may_compile):
            chosen = bench_ebr.without_compiled(chosen)
        found.append(("ebr", row.name, partial(bench_ebr.measure, chosen, 4, 1.0)))

    agop = {row.name: row for row in bench_agop.ROWS}
    for name in ("paper", "small2", "small3", "wide2", "six"):
        ebr(named[name], may_compile=True)
    for name, keep_agop in (
        ("relu", ("ours", "forward")), ("relu_wide", ("ours", "forward")),
        ("deep", ("ours", "ours_probe", "sum_trick", "torch_probe")),
    ):  # fmt: skip
        row = replace(agop[name], candidates=keep_agop, compiled=())
        found.append(("agop", name, partial(bench_agop.measure, row, 5)))
    points = [row for row in bench_ebr.GRID if row.m in (2, 8) and row.batch in (32, 512) and row.d != 32]
    for row in sorted(points, key=lambda row: row.batch * row.h * row.m):
        ebr(
            replace(row, candidates=(*row.candidates, "floor_bf16" if "bfloat16" in row.name else "floor")),
            may_compile=False,
        )
    return found


def products_in_force() -> str:
    from mmc_fast.ops import native
    from mmc_fast.ops.ebr import products

    pinned = str(native.native().pinned_ways())
    if pinned != "auto":
        return f"{pinned} (pinned)"
    classes = int(products.stored()["by_blas"], 16).bit_count()
    return "tiles" if not classes else f"measured: BLAS in {classes} of 48 classes"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=4.0, help="no row is begun after so many")
    parser.add_argument(
        "--no-compile", action="store_true", help="without torch.compile, which takes half a minute a row"
    )
    parser.add_argument("--avx2", action="store_true", help="library and torch limited to AVX2")
    parser.add_argument("--record", action="store_true", help="write bench/grid.csv and docs/results/processors.md")
    parser.add_argument(
        "--render", action="store_true", help="only write docs/results/processors.md from bench/grid.csv"
    )
    options = parser.parse_args(argv)
    if options.render:
        PAGE.write_text(page(PAGE.read_text(), read()))
        return 0
    if options.avx2 and any(os.environ.get(name) != value for name, value in AVX2.items()):
        again = [sys.executable, *sys.argv] if argv is None else [sys.executable, __file__, *argv]
        os.execve(sys.executable, again, os.environ | AVX2)  # torch reads them when it is imported

    import machine

    torch.set_num_threads(1)
    place = (machine.this_class(), machine.name(), datetime.date.today().isoformat())
    print("processor: {1}\nclass: {0}".format(*place), flush=True)
    start, found, busy, left = time.monotonic(), [], [], []
    for bench, row, measure in measurements(compiled=not (options.no_compile or options.avx2)):
        if time.monotonic() - start > 60 * options.minutes:
            left.append(row)
            continue
        result = measure()
        lines = entries_of(bench, result, place, products_in_force())
        print(
            table(lines).split("\n", 2)[2] + (f"  BUSY: {'; '.join(result['load'])}" if result["load"] else ""),
            flush=True,
        )
        (busy if result["load"] else found).extend(lines)
    if left:
        print(f"not begun within {options.minutes:g} minutes: {', '.join(left)}")
    if not options.record:
        return 0
    write(found)
    PAGE.write_text(page(PAGE.read_text(), read()))
    print(f"{len(found)} rows written to {TABLE.name} and {PAGE.name}")
    if busy:
        print(f"not recorded, the machine was busy: {', '.join(e.row for e in busy)}", file=sys.stderr)
    return 1 if busy else 0


if __name__ == "__main__":
    sys.exit(main())
