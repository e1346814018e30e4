"""Multi-label: any of L labels in each row; binary cross-entropy, a probability for each label, macro AUC."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast.errors import InputError

from .base import Reduction, Task, check_numbers, checked, metrics, reduced


@dataclass(frozen=True)
class MultiLabel(Task):
    """Labels int64 0/1 ``[N, L]``; outputs are logits, answers probabilities of each label.

    ``weights``: of the positives of each label in the loss; () counts them like negatives.
    """

    weights: tuple[float, ...] = ()
    kind: ClassVar[str] = "multilabel"
    prior_text: ClassVar[str] = "the label shares of the training rows"

    @property
    def metric(self) -> str:
        return "macro_auroc"

    def tensor(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels.astype(np.int64))

    def unknown(self, rows: int) -> np.ndarray:
        return np.zeros((rows, len(self.names)), np.int64)

    def check(self, labels: Tensor, where: str) -> None:
        check_numbers(labels, len(self.names), torch.int64, where)
        bad = ((labels != 0) & (labels != 1)).any(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(f"{where}: labels {labels[row].tolist()} in row {row}; each label is 0 or 1.")

    def check_part(self, labels: Tensor, part: str, where: str) -> None:
        if part != "train":
            return super().check_part(labels, part, where)
        for name, y in zip(self.names, labels.t(), strict=True):
            if len(y.unique()) < 2:
                raise InputError(
                    f"{where}: label {name!r} is {int(y[0])} in every training row, so it can never be learned; "
                    "change the split or leave the label out."
                )

    def weighted(self, labels: Tensor) -> MultiLabel:
        positive = labels.double().mean(0)
        return replace(self, weights=tuple(((1 - positive) / positive).tolist()))

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """The rarest label that a row has, 0 for none."""
        order = np.argsort(labels.sum(0), kind="stable")
        ranked = labels[:, order] == 1
        return np.where(ranked.any(1), 1 + ranked.argmax(1), 0).astype(np.int64)

    def loss(self, outputs: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
        weights = outputs.new_tensor(self.weights) if self.weights else None
        y = labels.to(outputs.dtype)
        losses = F.binary_cross_entropy_with_logits(outputs, y, reduction="none", pos_weight=weights)
        return reduced(losses.mean(-1), reduction)

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Mean over the labels of KL between Bernoulli distributions."""
        p, both = target.sigmoid(), F.logsigmoid
        found = p * (both(target) - both(outputs)) + (1 - p) * (both(-target) - both(-outputs))
        return found.mean(-1).sum()

    def prior(self, labels: Tensor) -> Tensor:
        return labels.double().mean(0).clamp(1e-12, 1 - 1e-12).logit().float()

    def answers(self, outputs: Tensor) -> Tensor:
        return outputs.sigmoid()

    def inverse(self, answers: Tensor) -> Tensor:
        return answers.logit(1e-7)

    def scorable(self, labels: Tensor) -> bool:
        return bool(self._known(labels).any())

    def _known(self, labels: Tensor) -> Tensor:
        """Labels that have both values, bool ``[L]``."""
        return (labels == 1).any(0) & (labels == 0).any(0)

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Mean AUC over the labels that have positives and negatives."""
        p, y = checked(answers, labels)
        known = self._known(labels).numpy()
        if not known.any():
            raise InputError("score: no label has positives and negatives; give other rows")
        return float(np.mean([metrics().roc_auc_score(y[:, j], p[:, j]) for j in np.flatnonzero(known)]))

    def scores(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        """ "macro_auprc": mean average precision over the labels that have both values; "micro_auprc": over all pairs of row and label;
        "f1": micro-averaged at a probability of one half."""
        result = {"score": self.score(answers, labels)}
        p, y = answers.numpy(), labels.numpy()
        known = np.flatnonzero(self._known(labels).numpy())
        result["macro_auprc"] = float(np.mean([metrics().average_precision_score(y[:, j], p[:, j]) for j in known]))
        result["micro_auprc"] = float(metrics().average_precision_score(y.ravel(), p.ravel()))
        result["f1"] = float(metrics().f1_score(y, p > 0.5, average="micro", zero_division=0))
        return result

    def columns(self, answers: Tensor) -> dict[str, Any]:
        """``prediction``: the labels of a probability above one half, joined by +; ``p_LABEL`` for each label."""
        guess = [[n for n, p in zip(self.names, row, strict=True) if p > 0.5] for row in answers.tolist()]
        found: dict[str, Any] = {"prediction": ["+".join(names) for names in guess]}
        return found | {f"p_{name}": answers[:, i].numpy() for i, name in enumerate(self.names)}
