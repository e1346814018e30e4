"""Scores of every coalition of modalities, for random groups of samples."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .measures.reliance import coalitions

__all__ = ["CoalitionScores"]

_KEPT = ("correct", "rows", "classes", "_scores", "_labels", "_places", "_constant")


class CoalitionScores:
    """Accuracy from counts per group; AUROC from one number per sample and coalition.

    AUROC of a weighting of groups follows exactly from ``U[k, l]`` = pairs of a positive of group k ranked above a
    negative of group l (half for a tie): ``Σ w_k w_l U[k, l] / (Σ w_k P_k)(Σ w_l N_l)``.
    """

    def __init__(self, metric: str, modalities: int, groups: int) -> None:
        self.metric, self.groups = metric, groups
        self.size = len(coalitions(modalities))
        self.correct = np.zeros((self.size, groups))
        self.rows = np.zeros(groups)
        self.classes = np.zeros((groups, 0))
        self._scores: list[Tensor] = []
        self._labels: list[Tensor] = []
        self._places: list[Tensor] = []
        self._constant: Tensor | None = None

    def add(self, outputs: Tensor, labels: Tensor, places: Tensor) -> None:
        """``outputs [2^m, B, C]`` of one batch, its labels and the group of each row."""
        if not len(labels):
            return
        place = places.numpy()
        width = max(self.classes.shape[1], int(labels.max()) + 1, outputs.shape[2])
        self.classes = np.pad(self.classes, ((0, 0), (0, width - self.classes.shape[1])))
        np.add.at(self.classes, (place, labels.numpy()), 1)
        self.rows += np.bincount(place, minlength=self.groups)
        outputs = self._steady(outputs.detach().cpu())
        if self.metric == "accuracy":
            guess = outputs.argmax(-1) if outputs.shape[-1] > 1 else (outputs[..., 0] > 0).long()
            hits = (guess == labels).double().numpy()
            for c in range(self.size):
                self.correct[c] += np.bincount(place, weights=hits[c], minlength=self.groups)
            return
        margin = outputs[..., 1] - outputs[..., 0] if outputs.shape[-1] == 2 else outputs[..., 0]
        self._scores.append(margin.float())
        self._labels.append(labels)
        self._places.append(places)

    def _steady(self, outputs: Tensor) -> Tensor:
        """Without any modality all rows are alike, unless the model sees something else; undo rounding that tells batches.

        Ranking by it would give an AUROC other than one half.
        """
        if self._constant is None:
            self._constant = outputs[0, :1].clone()
        tolerance = 1e-5 * float(self._constant.abs().max().clamp(min=1e-6))
        if float((outputs[0] - self._constant).abs().max()) > tolerance:
            return outputs
        return torch.cat([self._constant.expand_as(outputs[0])[None], outputs[1:]])

    def chance(self) -> float:
        """Score of a model that knows only the frequencies of the classes."""
        counts = self.classes.sum(0)
        return 0.5 if self.metric == "auroc" else float(counts.max() / counts.sum())

    def chance_error(self) -> float:
        """Standard error of the score of such a model on as many samples, from the binomial or the rank sum."""
        counts = self.classes.sum(0)
        if self.metric == "auroc":
            return math.sqrt((counts.sum() + 1) / (12 * counts[0] * counts[1]))
        return math.sqrt(self.chance() * (1 - self.chance()) / counts.sum())

    def seen_classes(self) -> int:
        """How many classes the labels hold."""
        return int((self.classes.sum(0) > 0).sum())

    def scores(self, weights: np.ndarray) -> np.ndarray:
        """``[2^m, R]`` for group weights ``[R, K]``; NaN where a draw lacks a class."""
        if self.metric == "accuracy":
            return self.correct @ weights.T / (self.rows @ weights.T)
        wins = self._wins()
        pairs = np.einsum("rk,ckl,rl->cr", weights, wins, weights)
        with np.errstate(invalid="ignore", divide="ignore"):
            return pairs / ((weights @ self.classes[:, 1]) * (weights @ self.classes[:, 0]))

    def _wins(self) -> np.ndarray:
        scores = torch.cat(self._scores, 1).numpy()
        labels, places = torch.cat(self._labels).numpy(), torch.cat(self._places).numpy()
        wins = np.zeros((self.size, self.groups, self.groups))
        positive = labels == 1
        for c in range(self.size):
            high, where = scores[c, positive], places[positive]
            for group in range(self.groups):
                low = np.sort(scores[c, ~positive & (places == group)])
                below = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")) / 2
                wins[c, :, group] = np.bincount(where, weights=below, minlength=self.groups)
        return wins

    def to_state(self) -> dict[str, Any]:
        """What :meth:`load_state` goes on from: tensors, lists of such, None."""
        values = {name: getattr(self, name) for name in _KEPT}
        return {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in values.items()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in _KEPT:
            array = isinstance(getattr(self, name), np.ndarray)
            setattr(self, name, state[name].numpy().copy() if array else state[name])
