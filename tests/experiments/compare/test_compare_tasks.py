"""The comparison of methods on tasks other than classification: scores, names, and who is refused before anything trains."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import r2_score, roc_auc_score
from training_data import check_one_line
from typer.testing import CliRunner

from mmc_fast.cli import app
from mmc_fast.cli.compare import METHODS as DEFAULT
from mmc_fast.errors import InputError
from mmc_fast.experiments.jobs import read

LABELS = {"regression": ["cost"], "multilabel": ["flu", "cold"], "survival": ["days", "died"]}


def concordance(labels: np.ndarray, risk: np.ndarray) -> float:
    pairs = [
        1.0 if a > b else 0.5 * float(a == b)
        for (t, event), a in zip(labels.tolist(), risk.ravel(), strict=True)
        for (u, other), b in zip(labels.tolist(), risk.ravel(), strict=True)
        if event and (t < u or (t == u and not other))
    ]
    return float(np.mean(pairs))


JUDGES = {
    "regression": ("r2", "R²", r2_score),
    "multilabel": ("macro_auroc", "mean AUC (ROC)", roc_auc_score),
    "survival": ("concordance", "concordance", concordance),
}


def written(folder: Path, kind: str, seed: int) -> Path:
    """A table of two modalities, its column map, and the TOML file for --data."""
    g = np.random.default_rng(seed)
    hidden = g.normal(size=(90, 2))
    outcome = {
        "cost": 5e4 + 1e4 * hidden.sum(1),
        "flu": (hidden[:, 0] > 0.3).astype(int),
        "cold": (hidden[:, 1] > -0.3).astype(int),
        "days": np.exp(2 - hidden.sum(1)).clip(0.1, 20).round(2),
        "died": (hidden.sum(1) > -1).astype(int),
    }
    columns = {"id": np.arange(90), "na": hidden[:, 0], "words": 100 * hidden[:, 1], "tone": g.normal(size=90)}
    columns |= {name: outcome[name] for name in LABELS[kind]}
    with open(folder / f"{kind}.csv", "w") as file:
        csv.writer(file).writerows([columns, *zip(*columns.values(), strict=True)])
    label = LABELS[kind][0] if len(LABELS[kind]) == 1 else LABELS[kind]
    roles = f'id = "id"\nlabel = {json.dumps(label)}\nkind = "{kind}"\n[modalities]\nlabs = ["na"]\n'
    (folder / "map.toml").write_text(roles + 'notes = ["words", "tone"]\n')
    path = folder / f"{kind}.toml"
    path.write_text(
        f'data = "{kind}.csv"\ncolumns = "map.toml"\nsplit_seed = 0\n[budget]\nepochs = 1\nencoder_dim = 8\n'
    )
    return path


def command(*arguments: object):
    return CliRunner().invoke(app, ["compare", "--jobs", "1", "--tune", "never", *map(str, arguments)])


@pytest.mark.parametrize("kind", list(LABELS))
def test_a_comparison_scores_by_the_metric_of_the_task(kind, tmp_path, seed):
    out, (metric, title, judge) = tmp_path / "out", JUDGES[kind]
    methods = ["vanilla", "dropout", "ebr-best", "shaspec", "mt"]
    done = command("--methods", ",".join(methods), "--data", written(tmp_path, kind, seed), "--seeds", 2, "--rates", 0.4,
                   "--out", out)  # fmt: skip
    assert done.exit_code == 0, done.output
    assert f"{kind}: test {title}, mean" in done.output
    assert f"Test {title}, 2 seed(s):" in (out / "results.md").read_text()
    assert f"MT − vanilla, {title}, complete" in (out / "results.md").read_text()
    assert title in (out / "report.html").read_text()
    with open(out / "results.csv") as file:
        lines = {(r["method"], r["condition"]): r for r in csv.DictReader(file)}
    assert {method for method, _ in lines} == set(methods)
    assert {r["metric"] for r in lines.values()} == {metric}
    for method in methods:
        runs = [read(p) for p in sorted((out / "runs" / kind).glob(f"{method}-*.npz"))]
        for key, condition in (("complete", "complete"), ("missing_0.4", "0.4 missing")):
            wanted = np.mean([judge(r.arrays["labels"], r.arrays[key]) for r in runs])
            assert float(lines[method, condition]["mean"]) == pytest.approx(wanted, rel=1e-5)
            assert np.mean([r.values["scores"][key]["score"] for r in runs]) == pytest.approx(wanted, rel=1e-5)


def test_methods_for_classes_are_refused_before_anything_trains(tmp_path, seed):
    out, data = tmp_path / "out", written(tmp_path, "regression", seed)
    done = command("--methods", "vanilla,logistic,shaspec,muse+kd", "--data", data, "--seeds", 1, "--out", out)
    assert done.exit_code == 2
    wanted = "method logistic cannot be trained here: it is for classes, and regression holds a task of regression"
    assert f"{wanted}; give --methods vanilla,shaspec" in done.output
    assert not list(out.rglob("*.npz"))
    check_one_line(InputError(done.output.strip()))


def test_of_the_default_methods_those_for_classes_are_left_out(tmp_path, seed):
    assert "muse" in DEFAULT.split(",")
    out = tmp_path / "out"
    done = command("--data", written(tmp_path, "survival", seed), "--seeds", 1, "--rates", "none", "--out", out)
    assert done.exit_code == 0, done.output
    assert "muse is left out. The method cannot be trained here: it is for classes" in done.output
    with open(out / "results.csv") as file:
        assert {r["method"] for r in csv.DictReader(file)} == set(DEFAULT.split(",")) - {"muse"}
    assert "left out: muse" in (out / "report.html").read_text()
