"""docs/experiments/training.md says what the code does: its tables name every option and every key."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from training_data import small, tiny

from mmc_fast.experiments.training import KDConfig, TrainConfig, train

TEXT = (Path(__file__).resolve().parents[3] / "docs" / "experiments" / "training.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`\"?([a-z_0-9]+)\"?", TEXT))


@pytest.mark.parametrize("kind", [TrainConfig, KDConfig])
def test_every_option_is_described(kind):
    missing = [f.name for f in dataclasses.fields(kind) if f.name not in NAMED]
    assert not missing


def test_stated_defaults_are_the_defaults():
    table = TEXT.split("## Options and defaults")[1].split("\n\n`KDConfig`")[0]
    config = TrainConfig()
    checked = 0
    for line in table.splitlines():
        cells = [c.strip() for c in line.strip("|").split("|")]
        names = re.findall(r"`([a-z_]+)`", cells[0])
        if len(cells) != 3 or not names or names == ["rates"] or names[0] in ("ebr", "kd"):
            continue
        stated = re.sub(r"\(preset.*?\)", "", cells[1])
        values = [v.strip() for v in (stated.split(", ") if len(names) > 1 else [stated])]
        for name, value in zip(names, values, strict=True):
            found = {"true": True, "false": False}.get(value)
            expected = getattr(config, name)
            if found is None:
                value = value.strip('`"')
                found = value if isinstance(expected, str) else eval(value)
            assert found == expected, name
            checked += 1
    assert checked >= 25


def test_every_key_of_the_record_is_described(seed):
    results = train(tiny(seed, num_classes=2), small("ebr", selection="masked"), seed=seed).results
    keys = set(results) | set(results["history"][0]) | set(results["adversarial"]) | set(results["scores"])
    keys |= (
        set(results["ranking"]) | set(results["adversarial"]["modality_probe"]) | set(results["adversarial"]["control"])
    )
    keys |= set(results["scores"]["missing"][0]) | set(results["scores"]["reliance"]["a"])
    keys |= set(results["data"]) | {"ebr_backend"}
    assert not keys - NAMED - {"stage"}
