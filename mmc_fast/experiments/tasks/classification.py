"""Classification: one of C classes; cross-entropy, class probabilities, AUC of two classes and accuracy of more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError

from .base import Reduction, Task, checked, metrics, reduced

METRICS = ("accuracy", "auroc")


@dataclass(frozen=True)
class Classification(Task):
    """Labels int64 ``[N]``; outputs are logits, answers class probabilities.

    ``main``: "accuracy" of the most probable class, or "auroc" of class 1 of two; "" chooses by their number.
    ``weights``: of the classes in the loss, with mean 1 over the training rows; () counts all rows alike.
    """

    main: str = ""
    weights: tuple[float, ...] = ()
    kind: ClassVar[str] = "classification"
    prior_text: ClassVar[str] = "the class shares of the training rows"

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise unknown("metric", self.metric, METRICS)

    @classmethod
    def of(cls, number: int, metric: str = "") -> Classification:
        """Classes that are called by their number."""
        return cls(tuple(map(str, range(number))), metric)

    @property
    def metric(self) -> str:
        return self.main or ("auroc" if len(self.names) == 2 else "accuracy")

    def tensor(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels.astype(np.int64))

    def unknown(self, rows: int) -> np.ndarray:
        return np.full(rows, -1, np.int64)

    def check(self, labels: Tensor, where: str) -> None:
        c = len(self.names)
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise InputError(
                f"{where}: labels must be int64 of shape [any], got {str(labels.dtype)[6:]} {list(labels.shape)}."
            )
        if c < 2:
            raise InputError(f"{where}: num_classes is {c}; a classifier needs at least 2.")
        if self.metric == "auroc" and c != 2:
            raise InputError(f"{where}: metric 'auroc' is for 2 classes and there are {c}; use 'accuracy'.")
        bad = (labels < 0) | (labels >= c)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(
                f"{where}: label {int(labels[row])} in row {row} is out of range; "
                f"allowed are 0 to {c - 1} (num_classes = {c})."
            )

    def check_part(self, labels: Tensor, part: str, where: str) -> None:
        if part != "train" and self.metric != "auroc":
            return
        missing = (torch.bincount(labels, minlength=len(self.names)) == 0).nonzero().flatten().tolist()
        if missing:
            reason = "can never be learned" if part == "train" else "leaves the AUC undefined"
            raise InputError(
                f"{where}: class {self.names[missing[0]]} has no row in the {part} part, so it {reason}; "
                "change the split or leave the class out."
            )

    def weighted(self, labels: Tensor) -> Classification:
        counts = torch.bincount(labels, minlength=len(self.names)).double()
        return replace(self, weights=tuple((len(labels) / (len(counts) * counts)).tolist()))

    def loss(self, outputs: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
        if not self.weights:
            return F.cross_entropy(outputs, labels, reduction=reduction)
        found = F.cross_entropy(outputs, labels, outputs.new_tensor(self.weights), reduction="none")
        return reduced(found, reduction)

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """KL(target || outputs)."""
        return F.kl_div(outputs.log_softmax(-1), target.log_softmax(-1), reduction="sum", log_target=True)

    def prior(self, labels: Tensor) -> Tensor:
        counts = torch.bincount(labels, minlength=len(self.names)).double()
        return (counts / counts.sum()).clamp(min=1e-12).log().float()

    def answers(self, outputs: Tensor) -> Tensor:
        return torch.softmax(outputs, -1)

    def inverse(self, answers: Tensor) -> Tensor:
        return answers.clamp(min=1e-12).log()

    def pooled(self, outputs: Tensor) -> Tensor:
        return outputs.log_softmax(-1)

    def scorable(self, labels: Tensor) -> bool:
        return len(labels) > 0 and (self.metric == "accuracy" or len(labels.unique()) == 2)

    @property
    def unscored(self) -> float:
        return 0.5 if self.metric == "auroc" else 0.0

    def score(self, answers: Tensor, labels: Tensor) -> float:
        p, y = checked(answers, labels)
        if self.metric == "accuracy":
            return float(metrics().accuracy_score(y, p.argmax(1)))
        if p.shape[1] != 2 or len(np.unique(y)) != 2:
            raise InputError(
                f"score: auroc needs 2 classes in labels and predictions, got {len(np.unique(y))} and {p.shape[1]}; "
                "use accuracy or other rows"
            )
        return float(metrics().roc_auc_score(y, p[:, 1]))

    def scores(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """Under auroc "auprc", the average precision of class 1; else "macro_auroc", the mean AUC of each class against
        the others, where every class has rows. "macro_f1": the mean F1 over the classes."""
        result = {"score": self.score(answers, labels)}
        p, y = answers.numpy(), labels.numpy()
        classes = range(p.shape[1])
        if self.metric == "auroc":
            result["auprc"] = float(metrics().average_precision_score(y, p[:, 1]))
        result["macro_f1"] = float(metrics().f1_score(y, p.argmax(1), average="macro", labels=classes, zero_division=0))
        if self.metric != "auroc" and len(np.unique(y)) == p.shape[1]:
            result["macro_auroc"] = float(np.mean([metrics().roc_auc_score(y == c, p[:, c]) for c in classes]))
        return result

    def columns(self, answers: Tensor) -> dict[str, Any]:
        """``prediction``, and ``p_CLASS`` for each class."""
        found: dict[str, Any] = {"prediction": [self.names[i] for i in answers.argmax(1).tolist()]}
        return found | {f"p_{name}": answers[:, i].numpy() for i, name in enumerate(self.names)}
