"""``Task``: everything of a run that depends on what is predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

Reduction = Literal["sum", "mean", "none"]
Own = TypeVar("Own", bound="Task")


class NotFiniteError(InputError):
    """Predictions that are NaN or infinite have no score."""


@dataclass(frozen=True)
class Task(ABC):
    """What a model predicts, with statistics of the training rows alone.

    Three spaces: labels as the data have them, ``[N]`` or ``[N, L]``; outputs ``[N, outputs]`` of the network, which the
    loss compares with :meth:`targets`; answers ``[N, A]``, which a user reads. Larger scores are better.
    ``names``: of the classes, labels or targets.
    """

    names: tuple[str, ...]
    kind: ClassVar[str]
    prior_text: ClassVar[str]
    """What a row without any modality gets as its answer."""

    @property
    @abstractmethod
    def metric(self) -> str:
        """Name of the main score, also in the diagnosis."""

    @property
    def outputs(self) -> int:
        """Width of the last layer."""
        return len(self.names)

    @abstractmethod
    def tensor(self, labels: np.ndarray) -> Tensor:
        """Labels in the dtype and shape of this task."""

    @abstractmethod
    def unknown(self, rows: int) -> np.ndarray:
        """Labels of rows that have none."""

    @abstractmethod
    def check(self, labels: Tensor, where: str) -> None:
        """Raise InputError unless the labels are of this task."""

    def check_part(self, labels: Tensor, part: str, where: str) -> None:
        """Raise InputError where the rows of a part cannot be trained or scored on."""
        if not self.scorable(labels):
            raise InputError(
                f"{where}: {self.metric} is undefined on the labels of the {part} part; give it other rows."
            )

    def fit(self: Own, labels: Tensor) -> Own:
        """With the statistics of these training labels."""
        return self

    def weighted(self: Own, labels: Tensor) -> Own:
        """With losses that count every class alike, by its share of these training labels. Raises InputError."""
        raise InputError(
            f"config: class_weights 'balanced' is for classes and labels, and the data hold a task of {self.kind}; "
            "set it to 'none'"
        )

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """int64 ``[N]``: what a drawn split holds in equal shares."""
        return labels

    def targets(self, labels: Tensor) -> Tensor:
        """What outputs are compared with."""
        return labels

    @abstractmethod
    def loss(self, outputs: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
        """The loss of each row, their sum or mean."""

    @abstractmethod
    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """How far outputs are from ``target`` ``[N, outputs]``, which is held fixed; summed over rows."""

    @abstractmethod
    def prior(self, labels: Tensor) -> Tensor:
        """Outputs float32 ``[outputs]`` of the best answer that is the same for all training rows."""

    @abstractmethod
    def answers(self, outputs: Tensor) -> Tensor:
        """Outputs as a user reads them."""

    @abstractmethod
    def inverse(self, answers: Tensor) -> Tensor:
        """Outputs that have these answers."""

    def pooled(self, outputs: Tensor) -> Tensor:
        """Outputs where a product of experts is a weighted sum of them."""
        return outputs

    def ranked(self, outputs: Tensor) -> Tensor:
        """Outputs as the diagnosis takes them."""
        return outputs

    def scored(self, answers: Tensor) -> Tensor:
        """What the main score reads of the answers."""
        return answers

    def scorable(self, labels: Tensor) -> bool:
        """Whether the main score is defined on these labels."""
        return len(labels) > 0

    @property
    def unscored(self) -> float:
        """The score that stands in where it is not defined."""
        return 0.5

    @abstractmethod
    def score(self, answers: Tensor, labels: Tensor) -> float:
        """The main score. Raises InputError where it is undefined, NotFiniteError for NaN and infinite answers."""

    @abstractmethod
    def scores(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """``{"score": main score}`` and what belongs beside it."""

    @abstractmethod
    def columns(self, answers: Tensor) -> dict[str, Any]:
        """Columns of a table of predictions."""

    def fits(self, other: Task) -> bool:
        """Whether a model of this task can be scored on data of the other."""
        return self.kind == other.kind and self.names == other.names

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; floats keep every digit."""
        return {"kind": self.kind} | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def metrics() -> Any:
    """scikit-learn's metrics; loaded when a score is taken."""
    return require("sklearn.metrics", extra="diagnose")


def checked(answers: Tensor, labels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Both as arrays, or InputError."""
    p, y = answers.numpy(), labels.numpy()
    if p.ndim != 2 or len(p) != len(y):
        raise InputError(f"score: answers {list(p.shape)} do not fit {len(y)} labels; give [N, C] and one label a row")
    if len(y) == 0:
        raise InputError("score: no rows; a score needs at least one")
    bad = ~np.isfinite(p).all(1)
    if bad.any():
        raise NotFiniteError(
            f"score: {int(bad.sum())} of {len(bad)} predictions are NaN or infinite (the first in row "
            f"{int(bad.argmax())}); features or weights are too large, so rescale the features"
        )
    return p, y


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """Losses ``[N]`` of rows, their sum or mean."""
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def check_numbers(labels: Tensor, columns: int, dtype: torch.dtype, where: str) -> None:
    """Raise InputError unless labels are finite ``[N, columns]`` of this dtype."""
    if labels.dtype != dtype or labels.dim() != 2 or labels.shape[1] != columns:
        raise InputError(
            f"{where}: labels must be {str(dtype)[6:]} of shape [any, {columns}], got {str(labels.dtype)[6:]} "
            f"{list(labels.shape)}."
        )
    bad = ~torch.isfinite(labels).all(1)
    if bad.any():
        raise InputError(f"{where}: the label of row {int(bad.nonzero()[0])} is NaN or infinite; leave the row out.")
