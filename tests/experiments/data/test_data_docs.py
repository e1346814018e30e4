"""The table of sets in docs/guides/data.md says what the registry says."""

from __future__ import annotations

import re
from pathlib import Path

from mmc_fast.experiments import data

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "guides" / "data.md").read_text(encoding="utf-8")


def test_sets_tasks_and_variants_are_listed() -> None:
    rows = {name: line for line in TEXT.splitlines() for name in re.findall(r"^\| `(\w+)`.* / ", line)}
    for info in data.available():
        if info.name == "avmnist_small":  # "the same" as the row above it
            continue
        for word in (*info.modalities, *info.variants, *(f"`{task}`" for task in info.tasks)):
            assert word in rows[info.name], (info.name, word)
