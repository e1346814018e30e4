"""Regression: one or several numbers; squared error of targets standardised on the training rows, R²."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mmc_fast.errors import InputError

from .base import Reduction, Task, check_numbers, checked, metrics, reduced


@dataclass(frozen=True)
class Regression(Task):
    """Labels float64 ``[N, L]`` in the units of the data, answers too; outputs are standardised.

    ``mean``, ``std``: of the training rows (population standard deviation).
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    kind: ClassVar[str] = "regression"
    prior_text: ClassVar[str] = "the mean of the training rows"

    @property
    def metric(self) -> str:
        return "r2"

    def tensor(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels.astype(np.float64).reshape(len(labels), -1))

    def unknown(self, rows: int) -> np.ndarray:
        return np.zeros((rows, len(self.names)))

    def check(self, labels: Tensor, where: str) -> None:
        check_numbers(labels, len(self.names), torch.float64, where)

    def check_part(self, labels: Tensor, part: str, where: str) -> None:
        for name, y in zip(self.names, labels.t(), strict=True):
            if len(y.unique()) < 2:
                raise InputError(
                    f"{where}: target {name!r} has fewer than two values in the {part} part, where R² is undefined; "
                    "change the split or leave the target out."
                )

    def fit(self, labels: Tensor) -> Regression:
        std = labels.std(0, correction=0)
        return replace(self, mean=tuple(labels.mean(0).tolist()), std=tuple(std.tolist()))

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Fifths of the first target."""
        y = labels.reshape(len(labels), -1)[:, 0]
        return np.searchsorted(np.quantile(y, (0.2, 0.4, 0.6, 0.8)), y, side="right").astype(np.int64)

    def targets(self, labels: Tensor) -> Tensor:
        return ((labels - labels.new_tensor(self.mean)) / labels.new_tensor(self.std)).float()

    def loss(self, outputs: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
        return reduced((outputs - self.targets(labels)).square().mean(-1), reduction)

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        return (outputs - target).square().mean(-1).sum()

    def prior(self, labels: Tensor) -> Tensor:
        return torch.zeros(len(self.names))

    def answers(self, outputs: Tensor) -> Tensor:
        y = outputs.double()
        return y * y.new_tensor(self.std) + y.new_tensor(self.mean)

    def inverse(self, answers: Tensor) -> Tensor:
        return self.targets(answers)

    def scorable(self, labels: Tensor) -> bool:
        return len(labels) > 1 and all(len(y.unique()) > 1 for y in labels.t())

    @property
    def unscored(self) -> float:
        return 0.0

    def score(self, answers: Tensor, labels: Tensor) -> float:
        p, y = checked(answers, labels)
        if not self.scorable(labels):
            raise InputError("score: R² needs two different values of every target; give other rows")
        return float(metrics().r2_score(y, p))

    def scores(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """ "rmse" and "mae" in the units of the data, means over the targets."""
        result = {"score": self.score(answers, labels)}
        p, y = answers.numpy(), labels.numpy()
        return result | {
            "rmse": float(metrics().root_mean_squared_error(y, p)),
            "mae": float(metrics().mean_absolute_error(y, p)),
        }

    def columns(self, answers: Tensor) -> dict[str, Any]:
        """``prediction``, or ``prediction_TARGET`` for several."""
        if len(self.names) == 1:
            return {"prediction": answers[:, 0].numpy()}
        return {f"prediction_{name}": answers[:, i].numpy() for i, name in enumerate(self.names)}
