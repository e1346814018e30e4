"""The study's page says what its run log says, test parts were opened for frozen settings only, and a line repeats."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
if not (ROOT / "bench").is_dir():
    pytest.skip("the study's scripts are part of the source tree only", allow_module_level=True)
sys.path.insert(0, str(ROOT / "bench"))

import study  # noqa: E402
import study_report  # noqa: E402

ROWS = study_report.lines()
FROZEN = json.loads(study.FROZEN.read_text())


def block(name: str) -> str:
    found = re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", study_report.PAGE.read_text(), re.S)
    assert found, f"docs/study.md has no block {name}"
    return found[1]


@pytest.mark.parametrize("stage", [s for s in study.STAGES if s != "planted"])
def test_tables_are_those_of_the_log(stage):
    assert block(stage) == study_report.validation_table(stage, ROWS)


def test_other_tables_are_those_of_the_log():
    assert block("planted") == study_report.planted_table(ROWS)
    assert block("ablation") == study_report.ablation_table(ROWS)
    assert block("test") == study_report.test_tables(json.loads(study_report.INTERVALS.read_text()))


def test_test_parts_were_opened_for_frozen_settings_only():
    opened = [row for row in ROWS if row["part"] == "test"]
    assert opened
    for row in opened:
        assert row["seed"] in study.TEST_SEEDS
        if row["name"] == "EBR paper form with normalised latents":  # the mistake that docs/study.md tells
            continue
        wanted = study.settings(FROZEN["test"][row["name"]], row["set"])
        stored = row["config"]
        for name, value in wanted.items():
            got = {k: stored["ebr"][k] for k in value} if name == "ebr" else stored[name]
            assert got == value, f"{row['name']} on {row['set']}: {name} is {got}, frozen is {value}"


def test_every_line_knows_what_it_ran():
    for row in ROWS:
        assert row["part"] == ("test" if row["stage"] == "test" else "validation")
        if "diverged" in row:
            continue
        assert 0 <= row["mean_missing"] <= 1
        assert row["mean_missing"] == pytest.approx(sum(row["missing"]) / len(row["missing"]))


def test_a_line_of_the_log_can_be_repeated():
    """On the processor of the log bit for bit; others round differently, which may move a few of 400 samples."""
    row = next(
        r for r in ROWS if (r["stage"], r["name"], r["set"], r["seed"]) == ("competitors", "vanilla", "mfeat", 0)
    )
    again = study.run(row)
    assert again["key"] == row["key"]
    assert again["missing"] == pytest.approx(row["missing"], abs=0.02)
    assert again["complete"] == pytest.approx(row["complete"], abs=0.02)
