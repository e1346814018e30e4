"""The grid of the performance page: what a result becomes, what the page shows, and that it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import grid  # noqa: E402

PLACE = ("AMD avx2", "A processor", "2026-01-01")
RESULT = {"row": "paper", "milliseconds": {"ours": 2.0, "floor": 4.0, "eager": 8.0, "ours_bf16": 1.0, "autocast": 0.5}}


def test_a_result_becomes_a_line_per_number_format():
    plain, low = grid.entries_of("ebr", RESULT, PLACE, "tiles")
    assert (plain.row, plain.ours, plain.floor, plain.eager, plain.compiled) == ("paper", 2.0, 4.0, 8.0, None)
    assert (low.row, low.ours, low.floor, low.eager) == ("paper bf16", 1.0, None, 0.5)
    lines = grid.table([plain, low]).splitlines()
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "`paper`", "A processor", "2", "4", "0.50", "0.25", "–", "–", "tiles", "2026-01-01",
    ]  # fmt: skip
    assert "| 2.00 |" in lines[3]


def test_a_new_measurement_replaces_that_of_its_class_alone(tmp_path):
    path = tmp_path / "grid.csv"
    first = grid.entries_of("ebr", RESULT, PLACE, "tiles")
    other = grid.entries_of("ebr", RESULT, ("Intel avx2", "Another", "2026-01-01"), "tiles")
    grid.write([*first, *other], path)
    assert grid.read(path) == [*first, *other]
    again = grid.entries_of("ebr", RESULT | {"milliseconds": {"ours": 1.5}}, PLACE, "measured")
    grid.write(again, path)
    assert {(e.processors, e.row): e.ours for e in grid.read(path)} == {
        ("AMD avx2", "paper"): 1.5, ("AMD avx2", "paper bf16"): 1.0,
        ("Intel avx2", "paper"): 2.0, ("Intel avx2", "paper bf16"): 1.0,
    }  # fmt: skip


def test_rows_of_the_grid_are_those_of_the_benches():
    names = [(bench, row) for bench, row, _ in grid.measurements(compiled=False)]
    assert {("ebr", "paper"), ("ebr", "small3"), ("agop", "relu"), ("agop", "deep")} <= set(names)
    assert len(set(names)) == len(names)
    recorded = {
        (e.bench, e.row.removesuffix(" bf16").removesuffix(" autocast").removesuffix(" one probe")) for e in grid.read()
    }
    assert recorded <= set(names)


def test_the_page_shows_what_is_recorded():
    text = grid.PAGE.read_text()
    assert grid.page(text, grid.read()) == text, "run python bench/grid.py --render"
