"""Two baselines of scikit-learn on the concatenated inputs: what a table without deep learning would say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mmc_fast._util.seeds import derive_seed

from ..training.metrics import score
from .base import Fitted, Method, Task, class_prior

__all__ = ["BOOSTING", "LOGISTIC"]


def _fit(task: Task, model: Any, absent: float) -> Fitted:
    """Fit on the train part; an absent modality enters as ``absent`` in all of its columns."""

    def table(features: Sequence[Tensor], present: Tensor) -> np.ndarray:
        return torch.cat([torch.where(present[:, i, None], x, absent) for i, x in enumerate(features)], -1).numpy()

    train, validation = task.dataset.part("train"), task.dataset.part("validation")
    model.fit(table(train.features, train.present), train.labels.numpy())

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        return torch.as_tensor(model.predict_proba(table(features, present)), dtype=torch.float32)

    fitted = Fitted(answer, class_prior(task.dataset), None, {})
    found = fitted.predict(validation.features, validation.present)
    fitted.record["val_score"] = score(found, validation.labels, task.dataset.metric)
    return fitted


def _logistic(task: Task) -> Fitted:
    return _fit(task, LogisticRegression(C=task.options["C"], max_iter=1000), 0.0)


def _boosting(task: Task) -> Fitted:
    seed = derive_seed(task.seed, "boosting") % 2**32
    return _fit(task, HistGradientBoostingClassifier(random_state=seed, **task.options), float("nan"))


LOGISTIC = Method(
    "logistic",
    "logistic regression",
    "scikit-learn; absent inputs are zeros",
    _logistic,
    tuple({"options": {"C": c}} for c in (0.1, 0.01, 1.0, 10.0)),
)
BOOSTING = Method(
    "boosting",
    "gradient boosting",
    "scikit-learn; absent inputs are NaN, which its trees split on",
    _boosting,
    tuple(
        {"options": {"learning_rate": lr, "max_leaf_nodes": n, "min_samples_leaf": 20}}
        for lr in (0.1, 0.05)
        for n in (31, 15)
    ),
)
