"""Tables of the comparison: the gate, paired tests, Holm's correction, every form of output."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from mmc_fast.cli.compare import print_comparison
from mmc_fast.diagnose.statistics import ResampledScores, holm
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.cells import Cell, write_cell
from mmc_fast.experiments.compare.output import READING, markdown, write_outputs
from mmc_fast.experiments.compare.rows import Row
from mmc_fast.experiments.compare.table import GATE, find
from mmc_fast.experiments.report.comparison import AVERAGE, COMPLETE
from mmc_fast.experiments.training import TrainConfig
from mmc_fast.experiments.training.metrics import scores

ROWS = [Row.parse(n, {"method": n}) for n in ("vanilla", "dropout", "muse", "shaspec")]
QUALITY = {"vanilla": 1.5, "dropout": 2.5, "muse": 1.52, "shaspec": 0.4}


def fabricated(folder, seed: int, seeds: int = 4, rows=ROWS):
    """Cells whose predictions are made, not trained: signal of the row's quality plus noise."""
    import torch

    g = np.random.default_rng(seed)
    labels = np.arange(600) % 2
    cells = []
    for s in range(seeds):
        shared = g.normal(size=600)
        for row in rows:
            config = TrainConfig(rates=(0.3, 0.6)).to_dict()
            cell = Cell(row.name, row.method, "made", "{}", "f", "test", s, config, {})
            arrays, found = {"labels": labels, "index": labels}, {}
            for name, share in (("complete", 1.0), ("missing_0.3", 0.8), ("missing_0.6", 0.5)):
                logit = share * QUALITY[row.name] * (labels - 0.5) + shared + 0.1 * g.normal(size=600)
                p = 1 / (1 + np.exp(-logit))
                arrays[name] = np.stack([1 - p, p], 1).astype(np.float32)
                found[name] = scores(torch.tensor(arrays[name]), torch.tensor(labels), "auroc")
            meta = {"schema_version": 1, "cell": cell.__dict__, "metric": "auroc", "batch_rows": None, "scores": found}
            meta |= {"diverged": None, "seconds": 1.0, "realised": {"missing_0.3": [0.3], "missing_0.6": [0.5]}}
            write_cell(folder, cell, arrays | {"meta": np.array(json.dumps(meta))})
            cells.append(cell)
    return cells


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_p_of_zero_is_that_of_the_interval(seed):
    g = np.random.default_rng(seed)
    plain = g.normal(0.3, 1, size=5)
    found = ResampledScores(plain, plain[:, None] + 0.2 * g.normal(size=(5, 400)))
    p = found.interval().p_zero
    low = found.interval(1 - p - 1e-6)
    high = found.interval(1 - p + 1e-6)
    assert low.excludes(0.0)
    assert not high.excludes(0.0)
    constant = ResampledScores(np.zeros(3), np.zeros((3, 50)))
    assert constant.interval().p_zero == 1.0


def test_gate_tests_and_family(tmp_path, seed):
    cells = fabricated(tmp_path, seed)
    settings = {(r.name, "made"): {} for r in ROWS}
    found = find(cells, tmp_path, ROWS, settings, resamples=200)[0]
    vanilla = found.main.scores["vanilla"][COMPLETE]
    for name in ("muse", "shaspec"):
        below = found.main.scores[name][COMPLETE].mean < vanilla.mean - vanilla.se
        assert found.rows[name].gate == (GATE if below else "passed")
    assert found.rows["shaspec"].gate == GATE
    assert GATE in found.rows["shaspec"].label
    assert found.rows["dropout"].gate == ""
    assert len(found.tests) == 2 * 2 * 3  # metrics x conditions x rows against vanilla
    assert {t.family for t in found.tests} == {12}
    assert [t.p_holm for t in found.tests] == pytest.approx(holm([t.p for t in found.tests]))
    test = next(t for t in found.tests if (t.row, t.metric, t.condition) == ("dropout", "auroc", AVERAGE))
    by_seed = {}
    for row in ("dropout", "vanilla"):
        by_seed[row] = []
        for cell in cells:
            if cell.row == row:
                with np.load(tmp_path / cell.path) as file:
                    meta = json.loads(str(file["meta"]))
                by_seed[row].append(np.mean([meta["scores"][f"missing_{r}"]["score"] for r in ("0.3", "0.6")]))
    difference = np.subtract(by_seed["dropout"], by_seed["vanilla"])
    assert test.difference == pytest.approx(difference.mean(), abs=1e-9)
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert test.pairs == 4
    assert test.p_wilcoxon >= 2 / 2**4
    assert test.low < test.difference < test.high


def test_without_vanilla_the_gate_is_not_judged_and_the_first_row_is_the_reference(tmp_path, seed):
    rows = ROWS[1:]
    cells = fabricated(tmp_path, seed, seeds=1, rows=rows)
    found = find(cells, tmp_path, rows, {(r.name, "made"): {} for r in rows}, resamples=50)[0]
    assert found.rows["muse"].gate == "not judged"
    assert {t.reference for t in found.tests} == {"dropout"}
    with pytest.raises(InputError, match="none of the rows"):
        find(cells, tmp_path, rows, {(r.name, "made"): {} for r in rows}, reference="vanilla")


def test_one_seed_gives_no_p_value_and_nothing_bold(tmp_path, seed, capsys):
    """The rows are so far apart that two seeds would make the best one bold."""
    for seeds in (1, 2):
        folder = tmp_path / str(seeds)
        cells = fabricated(folder, seed, seeds=seeds)
        findings = find(cells, folder, ROWS, {(r.name, "made"): {} for r in ROWS}, resamples=200)
        write_outputs(findings, folder, {"machine": "made"}, {"kind": "comparison"})
        print_comparison(Console(width=200), findings, folder)
        printed, text = capsys.readouterr().out, markdown(findings)
        stored = json.loads((folder / "results.json").read_text())["data_sets"][0]
        with open(folder / "results.csv") as file:
            lines = list(csv.DictReader(file))
        tests = stored["tests"]
        assert len(tests) == 12
        p_values = [t[name] for t in tests for name in ("p", "p_holm", "p_wilcoxon")]
        p_values += [d["p"] for c in stored["comparisons"].values() for d in c["differences"]]
        p_values += [line[name] or None for line in lines for name in ("p", "p_holm", "p_wilcoxon")]
        bold = [s["best"] for c in stored["comparisons"].values() for row in c["scores"].values() for s in row.values()]
        page = (folder / "report.html").read_text()
        body = text.replace(READING, "")
        if seeds == 1:
            assert set(p_values) == {None}
            assert not any(bold)
            assert {t["family"] for t in tests} == {0}
            assert "**" not in body
            assert not re.search(r"\*\d|p \(|Holm", printed)
            assert "p (Holm)" not in page
            assert "one seed" in printed
        else:
            assert all(isinstance(t["p_holm"], float) for t in tests)
            assert "p (Holm)" in printed
            assert "p (Holm)" in page
            assert "Holm over 12 tests" in body


def test_all_outputs_say_the_same(tmp_path, seed):
    cells = fabricated(tmp_path, seed)
    findings = find(cells, tmp_path, ROWS, {(r.name, "made"): {"lr": 0.1} for r in ROWS}, resamples=100)
    write_outputs(findings, tmp_path, {"machine": "made"}, {"kind": "comparison"})
    stored = json.loads((tmp_path / "results.json").read_text())["data_sets"][0]
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * 4  # rows x metrics x conditions
    text, page = markdown(findings), (tmp_path / "report.html").read_text()
    for line in lines:
        score = stored["comparisons"][line["metric"]]["scores"][line["row"]][line["condition"]]
        assert float(line["mean"]) == score["mean"]
        assert math.isfinite(float(line["se"]))
        shown = f"{score['mean']:.3f} ± {score['sd']:.3f}"
        assert shown in text
        assert shown in page
    assert GATE in page
    assert (tmp_path / "figures" / "made-missing-rates.png").stat().st_size > 1000
