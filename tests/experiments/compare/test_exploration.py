"""The exploration never meets a test row, its settings survive the log, and a line of the log can be repeated."""

from __future__ import annotations

import json
import math
import re
import runpy

import numpy as np
import pytest
from scipy.stats import sem

from mmc_fast._util.schema import from_mapping
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare import exploration
from mmc_fast.experiments.compare import gains as gains_module
from mmc_fast.experiments.compare.configs import load_data_configs
from mmc_fast.experiments.compare.gains import gains, table
from mmc_fast.experiments.compare.runs import check
from mmc_fast.experiments.training import TrainConfig

PROTOCOL = {
    "seeds": [3],
    "usual": ["plain"],
    "data": {"mfeat": {"rows": [60, 40, 50]}},
    "arms": {"plain": {"modality_dropout": 0.5, "epochs": 1, "encoder_width": 8, "encoder_dim": 4}},
    "options": {"base": {}, "norm": {"encoder_norm": True}},
}


def test_settings_survive_the_compact_form():
    config = TrainConfig.preset("robust", lr=0.01, modality_dropout=0.2)
    assert from_mapping(TrainConfig(), json.loads(json.dumps(exploration.compact(config))), "config") == config


def test_an_option_wins_over_its_arm_and_the_arm_over_the_budget_of_the_data():
    protocol = PROTOCOL | {
        "seeds": [3, 4],
        "arms": {"plain": {"lr": 0.1, "weight_decay": 0.2}, "wide": {"encoder_width": 9}},
        "options": {
            "base": {},
            "faster": {"lr": 0.3, "seeds": [5], "arms": ["wide", "plain"]},
            "elsewhere": {"data": ["support2"]},
            "trees": {"method": "boosting", "options": {"learning_rate": 0.5}, "data": ["mfeat"], "seeds": [6]},
        },
    }
    found = list(exploration.plan(protocol))
    assert [p[:4] for p in found] == [
        ("base", "plain", "mfeat", 3), ("base", "plain", "mfeat", 4), ("faster", "wide", "mfeat", 5),
        ("faster", "plain", "mfeat", 5), ("trees", "plain", "mfeat", 6),
    ]  # fmt: skip
    configs = [from_mapping(TrainConfig(), p.settings["config"], "config") for p in found]
    (budget,) = [d.budget_with({}) for d in load_data_configs(["mfeat"])]
    assert [(c.lr, c.weight_decay, c.encoder_width) for c in configs] == [
        (0.1, 0.2, budget.encoder_width), (0.1, 0.2, budget.encoder_width), (0.3, budget.weight_decay, 9),
        (0.3, 0.2, budget.encoder_width), (0.1, 0.2, budget.encoder_width),
    ]  # fmt: skip
    assert all((c.epochs, c.selection) == (budget.epochs, budget.selection) for c in configs)
    assert [(p.settings["method"], p.settings["options"]) for p in found[::2]] == [
        ("vanilla", {}), ("vanilla", {}), ("boosting", {"learning_rate": 0.5})
    ]  # fmt: skip
    assert {(p.settings["part"], p.settings["seed"] == p.seed, *p.settings["inner"]) for p in found} == {
        ("test", True, 60, 40, 50)
    }


def test_an_option_stands_on_another_but_not_on_its_arms():
    on_top = {"on": "norm", "arms": ["plain"], "lr": 0.5}
    options = {"norm": {"encoder_norm": True, "arms": []}, "norm-fast": on_top}
    (run,) = exploration.plan(PROTOCOL | {"options": options})
    usual = exploration.plan(PROTOCOL | {"options": {"norm-fast": {"arms": ["plain"]}}})
    assert run.settings["config"] == next(usual).settings["config"] | {"encoder_norm": True, "lr": 0.5}


def test_a_log_is_continued_and_its_lines_repeat(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    exploration.explore(PROTOCOL, log, ["base"])
    exploration.explore(PROTOCOL, log)
    exploration.explore(PROTOCOL, log)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["option"] for line in lines] == ["base", "norm"]
    assert check(tmp_path / "log.jsonl:2") == []
    lines[1]["scores"]["complete"] += 1e-9
    log.write_text("\n".join(map(json.dumps, lines)))
    assert check(tmp_path / "log.jsonl:2") == ["scores"]
    lines[1]["settings"]["config"]["an_option_of_then"] = 1
    log.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(InputError, match=f"an_option_of_then.*was run by commit {re.escape(str(lines[1]['commit']))}"):
        check(tmp_path / "log.jsonl:2")
    with pytest.raises(InputError, match="has 2 line"):
        check(tmp_path / "log.jsonl:3")


def test_gains_are_paired_by_seed_on_the_same_arm(seed):
    draw = np.random.default_rng(seed)
    scores = {arm: {o: draw.random((4, 3)) for o in ("base", "recipe", "recipe-more")} for arm in ("late", "plain")}
    names = ("complete", "missing_0.1", "missing_0.7")
    lost = {"failed": "diverged", "scores": None}
    lines = [
        {"option": option, "arm": arm, "data": "d", "seed": n, "failed": None,
         "scores": dict(zip(names, row.tolist(), strict=True))} | (lost if (option, n) == ("base", 2) else {})
        for arm, by_option in scores.items() for option, rows in by_option.items() for n, row in enumerate(rows)
    ]  # fmt: skip
    every = {(g.arm, g.option): g for g in gains(lines)}
    assert list(every) == [(arm, option) for arm in scores for option in ("recipe", "recipe-more")]
    for (arm, option), g in every.items():
        against, keep = {"recipe": ("base", [0, 1, 3]), "recipe-more": ("recipe", [0, 1, 2, 3])}[option]
        difference = (scores[arm][option] - scores[arm][against])[keep]
        missing, complete = difference[:, 1:].mean(1), difference[:, 0]
        assert g.against == against
        assert g.missing == pytest.approx((missing.mean(), sem(missing)))
        assert g.complete == pytest.approx((complete.mean(), sem(complete)))
        halves = (missing + complete) / 2
        assert g.halves == pytest.approx((halves.mean(), sem(halves)))
    found = {option: g for (arm, option), g in every.items() if arm == "plain"}
    lines = [line for line in lines if line["arm"] == "plain"]
    scores = scores["plain"]
    two = [found["recipe"], found["recipe"]._replace(data="e", halves=(0.5, 0.3))]
    mean, error = (found["recipe"].halves[0] + 0.5) / 2, math.hypot(found["recipe"].halves[1], 0.3) / 2
    assert table(two).endswith(f"(3) | {mean:+.4f} ± {error:.4f} |")
    assert {g.option: g.against for g in gains(lines, "recipe-more")} == dict.fromkeys(
        ("base", "recipe"), "recipe-more"
    )
    (twice,) = gains([line for line in lines if line["seed"] < 2 and line["option"] != "recipe-more"])
    assert twice.complete[1] == pytest.approx(sem((scores["recipe"] - scores["base"])[:2, 0]))
    (once,) = gains([line for line in lines if line["seed"] == 0 and line["option"] != "recipe-more"])
    assert (once.seeds, once.complete[0]) == (1, scores["recipe"][0, 0] - scores["base"][0, 0])
    assert math.isnan(once.complete[1])
    assert "±" not in table([once])


def test_the_command_prints_the_table_of_a_log_against_the_option_named(tmp_path, monkeypatch, capsys):
    lines = [
        {
            "option": option,
            "arm": "plain",
            "data": "d",
            "seed": 0,
            "failed": None,
            "scores": {"complete": s, "missing_0.1": s / 2},
        }
        for option, s in (("base", 0.5), ("norm", 0.75), ("recipe", 1.0))
    ]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for against in ([], ["norm"]):
        monkeypatch.setattr("sys.argv", ["gains", str(tmp_path / "log.jsonl"), *against])
        runpy.run_path(gains_module.__file__, run_name="__main__")
        assert capsys.readouterr().out.strip() == table(gains(lines, *against))
    assert table(gains(lines)) != table(gains(lines, "norm"))
