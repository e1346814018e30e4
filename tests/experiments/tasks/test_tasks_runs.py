"""Each kind of task from a table through train, evaluate and predict; and no statistic of other rows in any prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from training_data import small

from mmc_fast.experiments.data import MultimodalDataset
from mmc_fast.experiments.training import TrainConfig, TrainResult, load_run, train
from mmc_fast.experiments.training.evaluate import evaluate

ROWS = 150
ROLES: dict[str, dict[str, Any]] = {
    "regression": {"label": "cost"},
    "multilabel": {"label": ["flu", "cold"], "kind": "multilabel"},
    "classification": {"label": "ward"},
    "survival": {"label": ["days", "died"], "kind": "survival"},
}
ANSWERS = {
    "regression": ["prediction"],
    "multilabel": ["p_flu", "p_cold"],
    "classification": ["p_a", "p_b", "p_c"],
    "survival": ["prediction"],
}


def tables(seed: int, rows: int = ROWS) -> dict[str, pd.DataFrame]:
    """Two modalities and an outcome table of shuffled rows: text categories, gaps, patients without one of the tables."""
    g = np.random.default_rng(seed)
    ids, hidden = [f"p{i:03}" for i in range(rows)], g.normal(size=(rows, 2))
    labs = pd.DataFrame(
        {"id": ids, "na": hidden[:, 0] + 0.1 * g.normal(size=rows), "sex": np.where(hidden[:, 0] > 0, "m", "f")}
    )
    notes = pd.DataFrame({"id": ids, "words": hidden[:, 1] * 100, "tone": g.normal(size=rows)})
    labs.loc[g.random(rows) < 0.1, "na"] = np.nan
    outcome = pd.DataFrame({"id": ids, "cost": 5e4 + 1e4 * (hidden[:, 0] + hidden[:, 1])})
    outcome["flu"], outcome["cold"] = (hidden[:, 0] > 0.3).astype(int), (hidden[:, 1] > -0.3).astype(int)
    outcome["ward"] = np.array(["a", "b", "c"])[np.digitize(hidden[:, 0], [-0.5, 0.5])]
    outcome["days"] = np.exp(2 - hidden[:, 0] - hidden[:, 1] / 2).round(2) + 0.01
    outcome["died"] = outcome["days"] < 20
    outcome["days"] = outcome["days"].clip(upper=20)
    outcome["part"] = np.array(["train", "validation", "test"])[np.arange(rows) % 5 % 3]
    mixed = {"labs": labs, "notes": notes.iloc[: rows - 9], "outcome": outcome}
    return {name: t.sample(frac=1, random_state=seed).reset_index(drop=True) for name, t in mixed.items()}


def dataset(kind: str, found: dict[str, pd.DataFrame]) -> MultimodalDataset:
    unused = {
        c for roles in ROLES.values() for c in ([roles["label"]] if isinstance(roles["label"], str) else roles["label"])
    }
    label = ROLES[kind]["label"]
    mine = [label] if isinstance(label, str) else label
    given = found | {"outcome": found["outcome"].drop(columns=sorted(unused - set(mine)))}
    return MultimodalDataset.from_frames(given, id="id", split="part", nan_policy="indicator", **ROLES[kind])


def settings(**changes: Any) -> TrainConfig:
    return small(
        "ebr",
        **(
            {
                "epochs": 12,
                "control": False,
                "modality_dropout": 0.3,
                "consistency": 1.0,
                "lr": 0.01,
                "ebr_reversal": 0.01,
            }
            | changes
        ),
    )


def shown(result: TrainResult) -> np.ndarray:
    """Test answers as the table of predictions has them."""
    columns = result.model.task.columns(result.predictions[0].answers["complete"])
    names = ANSWERS[result.results["data"]["task"]["kind"]]
    return np.stack([columns[name] for name in names], 1)


@pytest.mark.parametrize("kind", list(ROLES))
def test_a_task_goes_through_train_evaluate_and_predict(kind, tmp_path: Path):
    found = tables(0)
    data = dataset(kind, found)
    result = train(data, settings(experts=True), seed=0, run_dir=tmp_path / "run")
    assert result.model.experts is not None
    assert bool(result.model.experts.fitted)
    scores = result.results["scores"]
    assert result.results["data"]["task"]["kind"] == kind
    assert scores["complete"] > {"regression": 0.3, "multilabel": 0.7, "classification": 0.5, "survival": 0.7}[kind]
    for entry in scores["reliance"].values():
        assert entry["shapley"] is not None
        assert entry["unimodal"] is not None
    if kind in ("multilabel", "survival"):  # the diagnosis scores by the same metric, in which nobody knows nothing
        total = sum(entry["shapley"] for entry in scores["reliance"].values())
        assert total == pytest.approx(scores["complete"] - 0.5, abs=1e-5)
    run = load_run(tmp_path / "run")
    again = evaluate(run.model, data, seed=0, rates=(0.3,), unimodal=run.unimodal)
    assert again["complete"] == scores["complete"]
    # The table of predictions repeats the answers behind the score, whatever the order and without labels.
    new = {
        name: t.drop(columns=[c for c in ("cost", "flu", "cold", "ward", "days", "died", "part") if c in t])
        for name, t in found.items()
    }
    table = (
        run.predict({k: t.sample(frac=1, random_state=1) for k, t in new.items() if k != "outcome"})
        .table()
        .set_index("id")
    )
    test = found["outcome"].query("part == 'test'").sort_values("id")["id"]
    np.testing.assert_allclose(table.loc[test, ANSWERS[kind]], shown(result), rtol=1e-5)
    # A cohort without one modality.
    only = run.predict({"labs": new["labs"]}).table()
    assert len(only) == ROWS
    assert np.isfinite(only[ANSWERS[kind]]).all(axis=None)


@pytest.mark.parametrize("kind", list(ROLES))
def test_nothing_of_other_rows_enters_a_run(kind, tmp_path: Path):
    """Other test rows, labels and features, leave the model and all predictions bitwise as they were."""
    found, changed = tables(1), tables(1)
    test = changed["outcome"].query("part == 'test'")["id"]
    here = changed["labs"]["id"].isin(test)
    changed["labs"].loc[here, "na"] = 1e6
    changed["labs"].loc[here, "sex"] = "x"
    here = changed["outcome"]["id"].isin(test)
    changed["outcome"].loc[here, "cost"] *= 100
    changed["outcome"].loc[here, "days"] *= 100
    changed["outcome"].loc[here, ["flu", "cold"]] = 1 - changed["outcome"].loc[here, ["flu", "cold"]]
    runs = [
        train(dataset(kind, t), settings(epochs=2), seed=3, evaluate_on=("validation",), run_dir=tmp_path / str(i))
        for i, t in enumerate((found, changed))
    ]
    assert runs[0].results["history"][-1]["val_score"] == runs[1].results["history"][-1]["val_score"]
    a, b = (r.model.state_dict() for r in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
    new = {"labs": found["labs"]}
    whole = load_run(tmp_path / "0").predict(new).answers
    torch.testing.assert_close(load_run(tmp_path / "1").predict(new).answers, whole, rtol=0, atol=0)
    other = {"labs": new["labs"].assign(na=new["labs"]["na"].where(new["labs"]["id"] == "p007", 9e9))}
    where = sorted(new["labs"]["id"]).index("p007")
    torch.testing.assert_close(load_run(tmp_path / "0").predict(other).answers[where], whole[where], rtol=0, atol=0)
