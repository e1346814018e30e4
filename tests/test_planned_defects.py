"""The list of planned defects stays applicable, one of it is caught, and mutants are what their operators say."""

from __future__ import annotations

import subprocess
import sys

import planned_defects
from planned_defects import mutants


def test_every_planned_defect_still_applies():
    problems = {d.name: planned_defects.problem(d) for d in planned_defects.load()}
    assert problems
    assert {name: why for name, why in problems.items() if why} == {}


def test_a_defect_is_caught_and_a_harmless_change_is_not():
    script = """
from planned_defects import ROOT, Bench, load, run
(ties,) = [d for d in load() if d.name == "ties of the ranking go away from the reference"]
bench = Bench()
print(run(ties, bench)[0], run(ties, bench, (ROOT / ties.file).read_text() + "# harmless")[0])
"""
    folder = planned_defects.ROOT / "tests"  # another process: here the package is imported already
    found = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True)
    assert found.stdout == "caught SURVIVED\n", found.stderr


def test_mutants_change_one_node_and_nothing_else():
    source = "def f(a, b):  # kept\n    return g(a,  b, strict=True) if a < 2 else -b\n"
    wanted = {
        "(g(a, b, strict=True) if not a < 2 else -b)", "if (a <= 2)", "if (a >= 2)", "< (3)", "< (1)", "< (0)",
        "(g(a, strict=True))", "(g(b, a, strict=True))", "else (b)", "return None",
    }  # fmt: skip
    made = [m.text for m in mutants.mutants({"f.py": source})]
    assert all(text.startswith("def f(a, b):  # kept\n") for text in made)
    assert {part for part in wanted if not any(part in text for text in made)} == set()
    assert len(made) == len(wanted)
