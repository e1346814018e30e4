"""Methods that the standard loop covers: their fitters, and what their settings share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ..training import predict, train
from .base import Fitted, Task, class_prior

__all__ = ["RATES_OF_LEARNING", "fit_standard"]

RATES_OF_LEARNING = tuple({"lr": lr, "weight_decay": decay} for decay in (0.0, 1e-4) for lr in (1e-3, 3e-4))


def fit_standard(task: Task) -> Fitted:
    """:func:`mmc_fast.experiments.training.train` with the settings of the task."""
    result = train(task.dataset, task.config, seed=task.seed, progress=task.progress, evaluate_on=(), distributed=False)
    model, results = result.model, result.results

    def answer(features: Sequence[Tensor], present: Tensor) -> Tensor:
        return predict(model, features, present)

    record: dict[str, Any] = {"label": results["label"], "selected_epoch": results["selected_epoch"]}
    record |= {"val_score": results["selected_val_score"], "unimodal": results["unimodal"]}
    record |= {"distillation": results["distillation"], "backend": results["environment"]["ebr_backend"]}
    if results["game"] is not None:
        record["fresh_discriminator"] = results["game"]["fresh_discriminator"]
    return Fitted(answer, class_prior(task.dataset), None, record)
