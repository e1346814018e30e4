"""The list of planned defects stays applicable, and a sample of it is caught; `make defects` runs all of it."""

from __future__ import annotations

import planned_defects


def test_every_planned_defect_still_applies():
    problems = {d.name: planned_defects.problem(d) for d in planned_defects.load()}
    assert problems
    assert {name: why for name, why in problems.items() if why} == {}


def test_a_defect_is_caught_and_a_harmless_change_is_not():
    (ties,) = [d for d in planned_defects.load() if d.name == "ties of the ranking go away from the reference"]
    assert planned_defects.run(ties)[0] == "caught"
    harmless = planned_defects.Defect(**{**vars(ties), "replace": ties.find})
    assert planned_defects.run(harmless)[0] == "SURVIVED"
