"""Scores of predictions, by scikit-learn."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError

__all__ = ["NotFiniteError", "score", "scores"]


class NotFiniteError(InputError):
    """Predictions that are NaN or infinite have no score."""


def _check(probabilities: np.ndarray, labels: np.ndarray) -> None:
    if probabilities.ndim != 2 or len(probabilities) != len(labels):
        raise InputError(
            f"score: probabilities {list(probabilities.shape)} do not fit {len(labels)} labels; give [N, C] and [N]"
        )
    if len(labels) == 0:
        raise InputError("score: no rows; a score needs at least one")
    bad = ~np.isfinite(probabilities).all(1)
    if bad.any():
        raise NotFiniteError(
            f"score: {int(bad.sum())} of {len(bad)} predictions are NaN or infinite (the first in row "
            f"{int(bad.argmax())}); features or weights are too large, so rescale the features"
        )


def score(probabilities: Tensor, labels: Tensor, metric: str) -> float:
    """The main score in [0, 1]: "accuracy" of the largest column, or "auroc" of column 1 (two classes).

    Raises:
        InputError: shapes that do not fit, no rows, predictions that are not finite, one class only under auroc, an unknown metric.
    """
    p, y = probabilities.numpy(), labels.numpy()
    _check(p, y)
    if metric == "accuracy":
        return float(accuracy_score(y, p.argmax(1)))
    if metric != "auroc":
        raise unknown("metric", metric, ("accuracy", "auroc"))
    if p.shape[1] != 2 or len(np.unique(y)) != 2:
        raise InputError(
            f"score: auroc needs 2 classes in labels and predictions, got {len(np.unique(y))} and {p.shape[1]}; "
            "use accuracy or other rows"
        )
    return float(roc_auc_score(y, p[:, 1]))


def scores(probabilities: Tensor, labels: Tensor, metric: str) -> dict[str, float]:
    """``{"score": main score}`` and what belongs beside it.

    Under auroc ``"auprc"``, the average precision of class 1; else ``"macro_f1"``, the mean F1 over the classes, and
    where every class has rows ``"macro_auroc"``, the mean AUC of each class against the others.
    """
    result = {"score": score(probabilities, labels, metric)}
    p, y = probabilities.numpy(), labels.numpy()
    if metric == "auroc":
        result["auprc"] = float(average_precision_score(y, p[:, 1]))
        return result
    classes = range(p.shape[1])
    result["macro_f1"] = float(f1_score(y, p.argmax(1), average="macro", labels=classes, zero_division=0))
    if len(np.unique(y)) == p.shape[1]:
        result["macro_auroc"] = float(np.mean([roc_auc_score(y == c, p[:, c]) for c in classes]))
    return result
