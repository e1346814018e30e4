"""Scores of classes by counting, and what has none."""

from __future__ import annotations

import pytest
import torch

from mmc_fast.errors import InputError
from mmc_fast.experiments.tasks import Classification, NotFiniteError


def test_accuracy_and_area_by_counting(seed):
    g = torch.Generator().manual_seed(seed)
    p, y = torch.rand(40, 2, generator=g).softmax(1), (torch.rand(40, generator=g) < 0.4).long()
    y[0], y[1] = 0, 1
    hits = sum(int(p[n, 1] > p[n, 0]) == int(y[n]) for n in range(40))
    assert Classification.of(p.shape[1], "accuracy").score(p, y) == pytest.approx(hits / 40)
    wins = [float(a > b) for a in p[y == 1, 1] for b in p[y == 0, 1]]
    assert Classification.of(p.shape[1], "auroc").score(p, y) == pytest.approx(sum(wins) / len(wins))
    ranked = y[p[:, 1].argsort(descending=True)].tolist()
    precision = [sum(ranked[: n + 1]) / (n + 1) for n in range(40) if ranked[n]]
    assert Classification.of(p.shape[1], "auroc").scores(p, y)["auprc"] == pytest.approx(
        sum(precision) / len(precision)
    )
    assert Classification.of(p.shape[1], "accuracy").scores(p, y)["score"] == Classification.of(
        p.shape[1], "accuracy"
    ).score(p, y)


def test_multi_class_scores_are_counted_by_hand():
    p = torch.tensor(
        [[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.4, 0.5, 0.1], [0.2, 0.1, 0.7], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]]
    )
    y = torch.tensor([0, 1, 0, 2, 2, 2])
    found = Classification.of(p.shape[1], "accuracy").scores(p, y)
    f1 = [2 * 1 / (2 * 1 + 1 + 1), 2 * 1 / (2 * 1 + 1), 2 * 2 / (2 * 2 + 1)]  # 2 TP / (2 TP + FP + FN)
    assert found["macro_f1"] == pytest.approx(sum(f1) / 3)
    auc = []
    for c in range(3):
        own, others = p[y == c, c], p[y != c, c]
        wins = (own[:, None] > others).double() + 0.5 * (own[:, None] == others)
        auc.append(float(wins.mean()))
    assert found["macro_auroc"] == pytest.approx(sum(auc) / 3)
    found = Classification.of(p.shape[1], "accuracy").scores(p[:3], y[:3])  # no row of class 2
    assert "macro_auroc" not in found
    assert found["macro_f1"] == pytest.approx((2 / 3 + 2 / 3 + 0) / 3), "a class without a row and a guess counts"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 2), torch.zeros(2).long(), "accuracy"), "do not fit"),
        ((torch.zeros(0, 2), torch.zeros(0).long(), "accuracy"), "no rows"),
        ((torch.zeros(3, 2), torch.zeros(3).long(), "auroc"), "needs 2 classes"),
        ((torch.zeros(3, 3), torch.tensor([0, 1, 2]), "auroc"), "needs 2 classes"),
    ],
)
def test_scores_refuse_what_has_no_score(arguments, message):
    with pytest.raises(InputError, match=message):
        Classification.of(max(2, arguments[0].shape[1]), "").score(*arguments[:2]) if arguments[2] == "accuracy" else (
            Classification.of(2, "auroc").score(*arguments[:2])
        )


def test_one_number_that_is_not_finite_is_enough():
    p = torch.tensor([[0.5, 0.5], [float("nan"), 0.5], [0.5, float("inf")]])
    with pytest.raises(NotFiniteError, match=r"2 of 3 predictions are NaN or infinite \(the first in row 1\)"):
        Classification.of(2).score(p, torch.tensor([0, 1, 0]))
