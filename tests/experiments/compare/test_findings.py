"""Findings of the comparison: the threshold, paired tests, Holm's correction, every form of output."""

from __future__ import annotations

import csv
import json
import math
import re

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from mmc_fast.cli.compare import print_comparison
from mmc_fast.diagnose.statistics import holm
from mmc_fast.errors import InputError
from mmc_fast.experiments.compare.configs import MethodConfig
from mmc_fast.experiments.compare.findings import UNDER_PERFORMING, find
from mmc_fast.experiments.compare.grid import Finished, Run
from mmc_fast.experiments.compare.output import READING, markdown, write_outputs
from mmc_fast.experiments.compare.runs import score
from mmc_fast.experiments.jobs import Job, Result
from mmc_fast.experiments.report.comparison import AVERAGE, COMPLETE
from mmc_fast.experiments.tasks import Classification

METHODS = [MethodConfig.parse(n, {"method": n}) for n in ("vanilla", "dropout", "muse", "shaspec")]
QUALITY = {"vanilla": 1.5, "dropout": 2.5, "muse": 1.52, "shaspec": 0.4}


def fabricated(seed: int, seeds: int = 4, methods=METHODS, selected=None) -> Finished:
    """Runs whose predictions are made, not trained: signal of the method's quality plus noise."""
    g = np.random.default_rng(seed)
    labels = np.arange(600) % 2
    runs = []
    for s in range(seeds):
        shared = g.normal(size=600)
        for method in methods:
            arrays, found = {"labels": labels, "index": labels}, {}
            for name, share in (("complete", 1.0), ("missing_0.3", 0.8), ("missing_0.6", 0.5)):
                logit = share * QUALITY[method.name] * (labels - 0.5) + shared + 0.1 * g.normal(size=600)
                p = 1 / (1 + np.exp(-logit))
                arrays[name] = np.stack([1 - p, p], 1).astype(np.float32)
                found[name] = Classification.of(2).scores(torch.tensor(arrays[name]), torch.tensor(labels))
            values = {"metric": "auroc", "batch_rows": None, "scores": found}
            values |= {"realised": {"missing_0.3": [0.3], "missing_0.6": [0.5]}}
            job = Job(f"runs/made/{method.name}-{s}", score, {})
            runs.append(Run(method.name, "made", s, job, Result({}, values, arrays, None, 1.0, 1)))
    return Finished({(m.name, "made"): selected or {} for m in methods}, runs)


def test_threshold_tests_and_family(seed):
    finished = fabricated(seed)
    (found,) = find(finished, METHODS, resamples=200)
    vanilla = found.main.scores["vanilla"][COMPLETE]
    for name in ("muse", "shaspec"):
        below = found.main.scores[name][COMPLETE].mean < vanilla.mean - vanilla.se
        assert found.methods[name].threshold == (UNDER_PERFORMING if below else "passed")
    assert found.methods["shaspec"].threshold == UNDER_PERFORMING
    assert "†" in found.methods["shaspec"].marked
    assert found.methods["dropout"].threshold == ""
    assert len(found.tests) == 2 * 2 * 3  # metrics x conditions x methods against vanilla
    assert {t.family for t in found.tests} == {12}
    assert [t.p_holm for t in found.tests] == pytest.approx(holm([t.p for t in found.tests]))
    test = next(t for t in found.tests if (t.method, t.metric, t.condition) == ("dropout", "auroc", AVERAGE))
    by_seed = {
        method: [
            np.mean([run.result.values["scores"][f"missing_{r}"]["score"] for r in ("0.3", "0.6")])
            for run in finished.runs
            if run.method == method
        ]
        for method in ("dropout", "vanilla")
    }
    difference = np.subtract(by_seed["dropout"], by_seed["vanilla"])
    assert test.difference == pytest.approx(difference.mean(), abs=1e-9)
    assert test.p_wilcoxon == pytest.approx(stats.wilcoxon(difference).pvalue)
    assert test.pairs == 4
    assert test.p_wilcoxon >= 2 / 2**4
    assert test.low < test.difference < test.high


def test_without_vanilla_the_first_method_is_the_reference(seed):
    methods = METHODS[1:]
    finished = fabricated(seed, seeds=2, methods=methods)
    (found,) = find(finished, methods, resamples=50)
    assert found.methods["muse"].threshold == "not judged"
    assert {t.reference for t in found.tests} == {"dropout"}
    with pytest.raises(InputError, match="none of the methods"):
        find(finished, methods, reference="vanilla")


def test_one_seed_gives_no_p_value_and_nothing_bold(tmp_path, seed, capsys):
    """The methods are so far apart that two seeds would make the best one bold."""
    for seeds in (1, 2):
        folder = tmp_path / str(seeds)
        folder.mkdir()
        findings = find(fabricated(seed, seeds=seeds), METHODS, resamples=200)
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
    findings = find(fabricated(seed, selected={"lr": 0.1}), METHODS, resamples=100)
    write_outputs(findings, tmp_path, {"machine": "made"}, {"kind": "comparison"})
    stored = json.loads((tmp_path / "results.json").read_text())["data_sets"][0]
    with open(tmp_path / "results.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 * 2 * 4  # methods x metrics x conditions
    text, page = markdown(findings), (tmp_path / "report.html").read_text()
    for line in lines:
        score = stored["comparisons"][line["metric"]]["scores"][line["method"]][line["condition"]]
        assert float(line["mean"]) == score["mean"]
        assert math.isfinite(float(line["se"]))
        shown = f"{score['mean']:.3f} ± {score['sd']:.3f}"
        assert shown in text
        assert shown in page
    assert UNDER_PERFORMING in page
    assert (tmp_path / "figures" / "made-missing-rates.png").stat().st_size > 1000
