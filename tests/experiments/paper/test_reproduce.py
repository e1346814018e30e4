"""Experiments of the paper: verdicts by hand-made numbers, smoke runs, numbers against the cells, resume, bad input."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import average_precision_score, roc_auc_score
from training_data import BUDGET, check_one_line, own_data
from typer.testing import CliRunner

from mmc_fast.cli import app
from mmc_fast.errors import InputError
from mmc_fast.experiments import jobs as jobs_module
from mmc_fast.experiments.compare.configs import DataConfig, MethodConfig, load_method_configs
from mmc_fast.experiments.compare.findings import UNDER_PERFORMING
from mmc_fast.experiments.jobs import Result, read
from mmc_fast.experiments.paper import (
    EXPERIMENTS,
    Direction,
    Estimate,
    Experiment,
    Outcome,
    Plan,
    ResultTable,
    Value,
    output,
    paired,
)
from mmc_fast.experiments.paper.output import direction_rows, markdown, table_columns, table_rows, to_dict
from mmc_fast.experiments.paper.paper import TABLE1, TABLE2, TABLE3, TABLE4, TABLE5
from mmc_fast.experiments.paper.scores import score_methods

ROOT = Path(__file__).resolve().parents[3]


def command(*arguments: object):
    return CliRunner().invoke(app, ["reproduce", *map(str, arguments)])


def runs(result: dict, folder: Path, method: str) -> list[Result]:
    files = sorted(c["file"] for c in result["record"]["runs"] if c["method"] == method)
    return [read(folder / "grid" / file) for file in files]


# Verdicts


@pytest.mark.parametrize(
    ("paper", "ours", "verdict"),
    [
        (0.03, (0.02, 0.01, 0.03), "agrees"),
        (0.03, (-0.02, -0.03, -0.01), "disagrees"),
        (0.03, (0.02, -0.01, 0.05), "undecided"),
        (-4.0, (-0.02, -0.03, -0.01), "agrees"),
        (-4.0, (0.02, 0.01, 0.03), "disagrees"),
        (-4.0, (-0.02, -0.05, 0.01), "undecided"),
        (0.03, (0.02, 0.0, 0.04), "undecided"),
        (0.03, (-0.02, -0.04, 0.0), "undecided"),
        (0.03, (0.02, -math.inf, math.inf), "undecided"),
        (0.03, None, "not measured"),
    ],
)
def test_the_verdict_is_the_side_of_zero_that_the_interval_lies_on(paper, ours, verdict):
    assert Direction("claim", paper, None if ours is None else Estimate(*ours)).verdict == verdict


@pytest.mark.parametrize("paper", [0.0, math.nan, math.inf])
def test_a_difference_of_nothing_is_no_direction(paper):
    with pytest.raises(ValueError, match="no direction"):
        Direction("claim", paper, None)


def test_paired_is_students_interval_of_the_differences(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(1, 1, 5), rng.normal(0, 1, 5)
    found = paired(a.tolist(), b.tolist())
    low, high = stats.t.interval(0.95, 4, loc=(a - b).mean(), scale=stats.sem(a - b))
    assert (found.value, found.low, found.high) == pytest.approx(((a - b).mean(), low, high))
    assert stats.ttest_rel(a, b).pvalue < 0.05 or found.low <= 0 <= found.high
    alone = paired([0.4], [0.1])
    assert alone.value == pytest.approx(0.3)
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    with pytest.raises(InputError, match="one of each per seed"):
        paired([1.0], [1.0, 2.0])


def test_tables_and_counts_are_printed_as_they_are():
    table = ResultTable("T", ["a", "b"], [("x", [Value(0.5, 0.01, 0.61), Value(0.25)]),
                                          ("y", [Value(paper=0.7), Value(mark="§")]), ("z", [Value(0.1), Value(0.2)])],
                        footnote="§ why")  # fmt: skip
    directions = [
        Direction("up", 0.1, Estimate(0.02, 0.01, 0.03)),
        Direction("weak", 0.1, Estimate(0.02, 0.01, 0.03), mark="†"),
        Direction("down", -12.5, Estimate(20.0, 10.0, 30.0)),
        Direction("one", 0.1, Estimate(0.02, -math.inf, math.inf)),
        Direction("none", 0.1, None),
    ]
    outcome = Outcome([table], directions, notes=["note"], facts={"f": "v"})
    assert outcome.summary == (
        "Of 5 directions of the paper: 2 agree (1 with a row marked †), 1 disagree, 1 undecided, 1 not measured."
    )
    assert table_columns(table) == ["method", "a", "paper", "b"]
    assert table_rows(table) == [["x", "0.500 ± 0.010", "0.6100", "0.250"], ["y", "–", "0.7000", "– §"],
                                 ["z", "0.100", "–", "0.200"]]  # fmt: skip
    printed = [[c if isinstance(c, str) else c.text for c in row] for row in direction_rows(outcome)]
    assert printed == [
        ["up", "+0.100", "+0.020", "+0.010 … +0.030", "agrees"],
        ["weak", "+0.100", "+0.020", "+0.010 … +0.030", "agrees †"],
        ["down", "−12.5", "+20.0", "+10.0 … +30.0", "disagrees"],
        ["one", "+0.100", "+0.020", "one seed", "undecided"],
        ["none", "+0.100", "–", "–", "not measured"],
    ]
    experiment = Experiment("t", "title", "paper", ("deviation",), (), lambda plan: outcome)
    text = markdown(experiment, outcome)
    for line in ("| x | 0.500 ± 0.010 | 0.6100 | 0.250 |", "- deviation", "- note", "§ why.", outcome.summary, "f: v."):
        assert line in text.splitlines()
    stored = json.loads(json.dumps(to_dict(experiment, outcome, {}), allow_nan=False))
    assert stored["directions"][3]["ours"] == {"value": 0.02, "low": None, "high": None}
    lines = list(csv.DictReader(io.StringIO(output._csv(experiment, outcome))))
    known = [{k: v for k, v in line.items() if v} for line in lines]
    assert known[0] == {
        "experiment": "t",
        "kind": "value",
        "table": "T",
        "row": "x",
        "column": "a",
        "mean": "0.5",
        "sd": "0.01",
        "paper": "0.61",
    }
    assert known[3] == {"experiment": "t", "kind": "value", "table": "T", "row": "y", "column": "b"}
    down = {
        "experiment": "t",
        "kind": "direction",
        "row": "down",
        "mean": "20.0",
        "low": "10.0",
        "high": "30.0",
        "paper": "-12.5",
    }
    assert known[8] == down | {"verdict": "disagrees"}
    assert known[10] == {
        "experiment": "t",
        "kind": "direction",
        "row": "none",
        "paper": "0.1",
        "verdict": "not measured",
    }
    assert len(known) == 11
    with pytest.raises(ValueError, match="1 values for 2 columns"):
        ResultTable("T", ["a", "b"], [("x", [Value()])])


# The paper's numbers, transcribed a second time

PRINTED = {
    1: """CM-AE .7873/.3620 · .6007/.3355; SMIL .7981/.3536 · .6155/.3279; MT .8176/.3467 · .6278/.2959;
        GRAPE .7657/.3733 · .6335/.3120; M3Care .8265/.3830 · .6020/.3870; ShaSpec .8100/.3630 · .6216/.3549;
        MUSE .8236/.3987 · .6781/.4185; EBR .8533/.4277 · .7030/.4290""",
    2: """GRAPE .8837/.4584 · .7085/.4551; GRAPE+KD .9011/.4620 · .7231/.4610; GRAPE+EBR .9102/.4799 · .7488/.4691;
        M3Care .8896/.4603 · .7067/.4532; M3Care+KD .8950/.4700 · .7080/.4562; M3Care+EBR .8987/.4850 · .7296/.4832;
        MUSE .9201/.4883 · .7351/.4985; MUSE+KD .9350/.4993 · .7402/.5066; MUSE+EBR .9380/.5001 · .7597/.5138""",
    3: """AE 89.78/89.33/89.78/88.89; GAN 89.11/89.78/91.11/93.11; Full2miss 90.00/91.11/92.23/92.67;
        GRAPE 89.65/90.42/91.15/91.37; SMIL 92.89/93.11/93.33/94.44; ShaSpec 93.33/93.56/93.78/94.67;
        MUSE 94.21/94.36/94.82/94.93; EBR 95.30/95.57/95.89/95.93""",
    4: """SMIL+EBR 93.77/94.02/94.51/94.96; ShaSpec+EBR 95.30/95.57/95.89/95.93; MUSE+EBR 95.02/95.26/95.61/95.70""",
    5: """kd-strongest .9196/.4875; kd-strongest-first .8651/.4130; kd-random .9005/.4685;
        kd-simultaneous .9102/.4786; kd .9350/.4993""",
}  # fmt: skip


@pytest.mark.parametrize(("number", "table"), [(1, TABLE1), (2, TABLE2), (3, TABLE3), (4, TABLE4), (5, TABLE5)])
def test_the_papers_numbers(number, table):
    printed = {}
    for entry in PRINTED[number].split(";"):
        name, _, numbers = entry.strip().partition(" ")
        printed[name.lower()] = [float(x) for x in re.findall(r"\d*\.\d+", numbers)]
    assert dict(table) == printed


# Experiments


@pytest.mark.parametrize("name", ["table1", "table2", "table5"])
def test_a_clinical_table_end_to_end(tmp_path, seed, name):
    data, out = own_data(tmp_path, seed), tmp_path / "out"
    done = command(name, "--data", data, "--seeds", 2, "--jobs", 1, "--out", out)
    assert done.exit_code == 0, done.output
    result = json.loads((out / name / "result.json").read_text())
    for file in ("result.md", "result.csv", "report.html"):
        assert (out / name / file).stat().st_size > 500, file
    assert len(list((out / name).glob("figures/*.png"))) == (2 if name == "table1" else 0)
    assert done.output.strip().splitlines()[-1] == result["summary"]
    assert sum(int(n) for n in re.findall(r"(\d+) (?:agree|disagree|undecided)", result["summary"])) == len(
        result["directions"]
    )
    table = result["tables"][0]
    assert table["columns"] == ["mine AUC (ROC)", "mine AUC (precision–recall)"]
    numbers = {"table1": TABLE1, "table2": TABLE2, "table5": TABLE5}[name]
    values = {r["label"]: r["values"] for r in table["rows"]}
    for label, row, key in {
        "table1": [("MUSE", "muse", "muse"), ("EBR (paper)", "ebr-paper", "ebr")],
        "table2": [("GRAPE + EBR", "grape+ebr", "grape+ebr"), ("M3Care", "m3care", "m3care")],
        "table5": [("KD, weakest to strongest", "kd", "kd"), ("KD, random order", "kd-random", "kd-random")],
    }[name]:
        found = runs(result, out, row)
        assert len(found) == 2
        for place, judge in enumerate((roc_auc_score, average_precision_score)):
            conditions = ["missing_0.2", "missing_0.5"] if name == "table1" else ["complete"]
            ours = [np.mean([judge(r.arrays["labels"], r.arrays[c][:, 1]) for c in conditions]) for r in found]
            assert values[label][place]["mean"] == pytest.approx(np.mean(ours), rel=1e-6)
            assert values[label][place]["sd"] == pytest.approx(np.std(ours, ddof=1), rel=1e-6)
            assert values[label][place]["paper"] == numbers[key][place]
    weak = {
        f["title"]
        for f in result["record"]["findings"]["mine"]["methods"].values()
        if f["threshold"] == UNDER_PERFORMING
    }
    for d in result["directions"]:
        assert d["mark"] == ("†" if weak & set(re.split(" above | below |, mine", d["claim"])) else "")
        side, (low, high) = math.copysign(1, d["paper"]), (d["ours"]["low"], d["ours"]["high"])
        expected = "undecided" if low <= 0 <= high else "agrees" if side * d["ours"]["value"] > 0 else "disagrees"
        assert d["verdict"] == expected
    with open(out / name / "result.csv") as file:
        kinds = [line["kind"] for line in csv.DictReader(file)]
    assert kinds.count("direction") == len(result["directions"])
    assert kinds.count("value") == 2 * len(table["rows"])


def test_finished_trainings_are_taken_over_and_shared(tmp_path, seed, monkeypatch):
    data, out = own_data(tmp_path, seed), tmp_path / "out"
    arguments = ("--data", data, "--seeds", 1, "--jobs", 1, "--out", out, "--json")
    first = command("table5", *arguments)
    assert first.exit_code == 0, first.output
    rows = []
    perform = jobs_module.perform
    monkeypatch.setattr(jobs_module, "perform", lambda job, *rest: rows.append(job.name) or perform(job, *rest))
    again = command("table5", *arguments)
    assert rows == []
    drop = ("seconds",)
    a, b = ({k: v for k, v in json.loads(done.stdout).items() if k not in drop} for done in (first, again))
    assert a == b
    assert command("table2", *arguments).exit_code == 0
    assert len(rows) == len(TABLE2)  # vanilla is that of table 5


def test_all_orders_of_distillation_have_the_same_settings(tmp_path, seed):
    data, out = own_data(tmp_path, seed), tmp_path / "out"
    done = command("table5", "--data", data, "--seeds", 1, "--jobs", 1, "--out", out, "--json")
    result = json.loads(done.stdout)
    for d in result["directions"]:  # one training of each
        assert (d["ours"]["low"], d["ours"]["high"], d["verdict"]) == (None, None, "undecided")
    plain = []
    for run in result["record"]["runs"]:
        if run["method"] != "vanilla":
            run["config"]["kd"] = {k: v for k, v in run["config"]["kd"].items() if k not in ("teachers", "order")}
            plain.append(run["config"])
    assert len(plain) == len(TABLE5)
    assert all(config == plain[0] for config in plain)


def test_stored_selections_of_kd_hold_for_every_order(tmp_path, seed):
    """A selection is stored for weakest-first alone; the others must not fall back to another learning rate."""
    (kd,) = load_method_configs(["kd"])
    data = own_data(tmp_path, seed).rename(tmp_path / "mfeat.toml")  # named as data that have a stored selection
    done = command("table5", "--data", data, "--seeds", 1, "--jobs", 1, "--out", tmp_path / "out", "--json")
    assert done.exit_code == 0, done.output
    rates = {c["method"]: c["config"]["lr"] for c in json.loads(done.stdout)["record"]["runs"]}
    assert {rates[name] for name in TABLE5} == {kd.selected["mfeat"]["lr"]}
    assert kd.selected["mfeat"]["lr"] != kd.plugin.search[0]["lr"]


def test_a_verdict_on_an_under_performing_baseline_is_marked(tmp_path, seed):
    """Methods that cannot learn fall below vanilla: whatever is said about them carries the mark."""
    own_data(tmp_path, seed)
    data = DataConfig("mine", str(tmp_path / "mine.npz"), {}, BUDGET | {"epochs": 12, "lr": 0.01})
    crippled = MethodConfig.parse("muse", {"method": "muse", "settings": {"lr": 1e-9}})
    methods = [*load_method_configs(["vanilla", "late"]), crippled]
    scored = score_methods(Plan(tmp_path / "out", ("mine",), seeds=(0, 1), workers=1), methods, [data], {})
    assert scored.findings["mine"].methods["muse"].threshold == UNDER_PERFORMING, scored.findings["mine"].main.scores
    assert scored.direction("mine", "auroc", ("late", "muse"), "complete", 1.0).mark == "†"
    assert scored.direction("mine", "auroc", ("muse", "late"), "complete", 1.0).mark == "†"
    assert scored.direction("mine", "auroc", ("late", "vanilla"), "complete", 1.0).mark == ""
    assert scored.value("mine", "auroc", "muse", "complete", None).mark == "†‡"
    plain, percent = (scored.value("mine", "auroc", "late", "complete", None, unit) for unit in (1.0, 100.0))
    assert (percent.mean, percent.sd) == pytest.approx((100 * plain.mean, 100 * plain.sd))
    pair = ("mine", "auroc", ("late", "vanilla"), "complete", 1.0)
    plain, percent = (scored.direction(*pair, unit=unit).ours for unit in (1.0, 100.0))
    assert list(vars(percent).values()) == pytest.approx([100 * x for x in vars(plain).values()])
    assert scored.footnote == (
        f"† {UNDER_PERFORMING}, below vanilla by more than one standard error on complete data; ‡ batch of 256"
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table3", "table4"])
def test_the_digits_in_both_readings(needs_data, tmp_path, name):
    needs_data("avmnist")
    out = tmp_path / "out"
    done = command(name, "--seeds", 1, "--epochs", 1, "--jobs", 1, "--out", out)
    assert done.exit_code == 0, done.output
    result = json.loads((out / name / "result.json").read_text())
    train, test = result["tables"]
    assert "training samples" in train["title"]
    assert "test samples" in test["title"]
    for reading, table in (("train", train), ("test", test)):
        record = result["record"][reading]
        file = next(c["file"] for c in record["runs"] if c["method"] == "muse")  # of the first share, where they differ
        arrays = read(out / "grid" / file).arrays
        values = {r["label"]: r["values"] for r in table["rows"]}
        assert [v["paper"] for v in values["MUSE"]] == list(TABLE3["muse"])
        key = "complete" if reading == "train" else "missing_0.95"
        accuracy = 100 * np.mean(arrays[key].argmax(1) == arrays["labels"])
        assert values["MUSE"][0]["mean"] == pytest.approx(accuracy)
        assert {c["data"] for c in record["runs"]} == (
            {f"avmnist-paper-{share}" for share in (95, 90, 85, 80)} if reading == "train" else {"avmnist-paper"}
        )
    if name == "table3":
        assert [r["values"][0] for r in train["rows"] if r["label"] == "GAN (not implemented)"] == [
            {"mean": None, "sd": None, "paper": 89.11, "mark": ""}
        ]
    realised = result["record"]["test"]["findings"]["avmnist-paper"]["realised"]
    assert [r[0] for r in realised.values()] == [0.0] * 4  # images are never missing
    assert [r[1] for r in realised.values()] == pytest.approx([0.95, 0.9, 0.85, 0.8], abs=0.06)


# Bad input


@pytest.mark.parametrize(
    ("arguments", "words"), [(("tabel5",), "Did you mean 'table5'"), (("table5", "--data", "mfeat,mfeat"), "each once")]
)
def test_bad_input_is_one_line_and_writes_no_result(tmp_path, arguments, words):
    done = command(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == 2, done.output
    assert words in done.output
    check_one_line(InputError(done.output.strip()))
    assert list(tmp_path.iterdir()) == []


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("")
    done = command("table5", "--data", "mfeat", "--out", tmp_path)
    assert done.exit_code == 2
    assert "holds no reproduction" in done.output


def test_every_experiment_says_what_it_is():
    page = (ROOT / "docs" / "experiments" / "paper.md").read_text(encoding="utf-8")
    for name, experiment in EXPERIMENTS.items():
        assert experiment.name == name
        assert experiment.paper.endswith(".")
        assert all(d.endswith(".") for d in experiment.deviations)
        assert experiment.data
        assert f"`{name}`" in page, name
