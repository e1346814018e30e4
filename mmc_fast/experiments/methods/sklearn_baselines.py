"""Baselines of scikit-learn on the concatenated inputs: what a table without deep learning would say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from mmc_fast._util.seeds import derive_seed, generator

from ..data import Part
from ..training.masks import training_masks
from .base import Fitted, Method, Task, prior, with_val_score


def masked_copies(part: Part, copies: int, random: torch.Generator) -> Part:
    """The rows, and ``copies`` times the rows with fresh masks, half of the modalities hidden."""
    masks = [training_masks(part.present, 0.5, random) for _ in range(copies)]
    rows = torch.arange(len(part)).repeat(1 + copies)
    return replace(part.select(rows), present=torch.cat([part.present, *masks]))


def _fit(task: Task, model: Any, absent: float, copies: int = 0) -> Fitted:
    """Fit on the train part and masked copies; an absent modality enters as ``absent`` in all of its columns."""

    def table(features: Sequence[Tensor], present: Tensor) -> np.ndarray:
        return torch.cat([torch.where(present[:, i, None], x, absent) for i, x in enumerate(features)], -1).numpy()

    train = masked_copies(task.dataset.part("train"), copies, generator(task.seed, "masks"))
    model.fit(table(train.features, train.present), train.labels.numpy())

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        return torch.as_tensor(model.predict_proba(table(features, present)), dtype=torch.float32)

    return with_val_score(Fitted(answer, prior(task.dataset), None, {}), task.dataset)


def _logistic(task: Task) -> Fitted:
    return _fit(task, LogisticRegression(C=task.options["C"], max_iter=1000), 0.0)


def _boosting(task: Task) -> Fitted:
    seed = derive_seed(task.seed, "boosting") % 2**32
    options = dict(task.options)
    copies = options.pop("copies")
    return _fit(task, HistGradientBoostingClassifier(random_state=seed, **options), float("nan"), copies)


LOGISTIC = Method(
    "logistic",
    "logistic regression",
    "scikit-learn; absent inputs are zeros",
    _logistic,
    tuple({"options": {"C": c}} for c in (0.1, 0.01, 1.0, 10.0)),
    classes_only=True,
)
_TREES = tuple(
    {"options": {"learning_rate": lr, "max_leaf_nodes": n, "min_samples_leaf": 20}}
    for lr in (0.1, 0.05)
    for n in (31, 15)
)
BOOSTING = Method(
    "boosting",
    "gradient boosting",
    "scikit-learn; absent inputs are NaN, which its trees split on",
    _boosting,
    _TREES,
    {"options": {"copies": 0}},
    classes_only=True,
)
BOOSTING_MASKED = Method(
    "boosting-masked",
    "gradient boosting on masked copies",
    "scikit-learn; the train rows and four copies with masks, absent inputs are NaN",
    _boosting,
    _TREES,
    {"options": {"copies": 4}},
    classes_only=True,
)
