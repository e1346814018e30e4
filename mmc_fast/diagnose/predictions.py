"""Scores of a model under many conditions, and how far each moves its outputs, for random groups of samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .measures.retrieval import recalled
from .ranking import RankedPairs
from .reservoir import Reservoir
from .statistics import comparable_pairs
from .tasks import RANKED, Task

_SUMS = ("rows", "hits", "classes", "moved", "total", "squared", "truth", "constant")
_SHUFFLES = 20


class ConditionScores:
    """Scores from sums per group; AUROC from ranked pairs of groups; concordance and a function from a sample of rows.

    ``macro_auroc`` is the mean over labels of their AUROC.
    """

    def __init__(self, task: Task, conditions: Mapping[str, int], groups: int, rows: int, seed: int) -> None:
        """``conditions``: name -> number of draws, over which its score is the mean."""
        self.task, self.conditions, self.groups = task, dict(conditions), groups
        self.index = {name: k for k, name in enumerate(conditions)}
        self.drawn = [(name, draw) for name, count in self.conditions.items() for draw in range(count)]
        k, c = len(self.index), max(2, task.outputs)
        self.rows = np.zeros(groups)
        self.hits = np.zeros((k, groups, {"f1": 2, "r2": task.outputs}.get(task.metric, 1)))
        self.classes = np.zeros((groups, c))
        self.truth = np.zeros((groups, c, 2))  # sums and squares of the labels
        self.moved = np.zeros((k, groups))
        self.total, self.squared = np.zeros((groups, c)), np.zeros((groups, c))
        self.constant = np.zeros(0)
        labels = task.outputs if task.kind == "labels" else 1
        self.ranked = [RankedPairs(len(self.drawn), groups) for _ in range(labels)]
        self.kept = Reservoir(rows, seed)
        self._pairs: dict[str, np.ndarray] | None = None

    def add(self, index: int, found: Mapping[tuple[str, int], Tensor], labels: Tensor, places: Tensor) -> None:
        """Outputs ``[B, C]`` of batch ``index`` by condition and draw, its labels and the group of each row.

        ``coalition.FULL``, the last coalition, is what the others move away from.
        """
        if not len(labels):
            return
        place, self._pairs = places.numpy(), None
        self.rows += np.bincount(place, minlength=self.groups)
        whole = self.task.answers(found[self._full, 0])
        c = whole.shape[1]
        self._sum(self.total[:, :c], place, whole.numpy())
        self._sum(self.squared[:, :c], place, whole.square().numpy())
        if self.task.kind == "classes":
            np.add.at(self.classes, (place, labels.numpy()), 1)
        else:
            truth = labels.double().numpy()
            self._sum(self.truth[:, : truth.shape[1], 0], place, truth)
            self._sum(self.truth[:, : truth.shape[1], 1], place, truth**2)
        margins = []
        for name, draw in self.drawn:
            y, k = found[name, draw], self.index[name]
            if name == "coalition.0":
                y = self._steady(y)
            share = 1 / self.conditions[name]
            if name.startswith("shuffled"):
                far = (self.task.answers(y) - whole).square().sum(1).numpy()
                self.moved[k] += share * np.bincount(place, weights=far, minlength=self.groups)
            if self.task.metric in RANKED:
                margins.append(self.task.margins(y))
            elif self.task.score is None:
                self._sum(self.hits[k], place, share * self._hits(y, labels))
        if self.task.metric == "concordance":
            self.kept.add(index, {"margins": torch.stack(margins, 1), "labels": labels, "places": places})
        elif self.task.metric in RANKED:
            for label, ranked in enumerate(self.ranked):
                one = labels if labels.dim() == 1 else labels[:, label]
                ranked.add(torch.stack([m if m.dim() == 1 else m[:, label] for m in margins]), one, places)
        elif self.task.score is not None:
            columns = {f"{name}/{draw}": found[name, draw] for name, draw in self.drawn}
            self.kept.add(index, columns | {"labels": labels, "places": places})

    @property
    def _full(self) -> str:
        return next(name for name in reversed(self.conditions) if name.startswith("coalition."))

    def _sum(self, into: np.ndarray, place: np.ndarray, values: np.ndarray) -> None:
        found = torch.zeros(self.groups, values.shape[1], dtype=torch.float64)
        into += found.index_add_(0, torch.from_numpy(place), torch.from_numpy(values).double()).numpy()

    def _hits(self, y: Tensor, labels: Tensor) -> np.ndarray:
        """What is summed for the score, ``[B, h]``."""
        if self.task.metric == "accuracy":
            guess = y.argmax(-1) if y.shape[-1] > 1 else (y[:, 0] > 0).long()
            return (guess == labels).double().numpy()[:, None]
        if self.task.metric == "f1":
            guess = y > 0
            both = (guess & labels.bool()).sum(1)
            return torch.stack([both, guess.sum(1)], 1).double().numpy()
        return (y.double() - labels.double()).square().numpy()

    def _steady(self, y: Tensor) -> Tensor:
        """Without any modality all rows are alike, unless other samples stand in; undo rounding that tells batches.

        Ranking by it would give an AUROC other than one half.
        """
        if not self.constant.size:
            self.constant = y[0].double().numpy()
        constant = torch.from_numpy(self.constant).to(y)
        near = float((y - constant).abs().max()) <= 1e-5 * float(constant.abs().max().clamp(min=1e-6))
        return constant.expand_as(y) if near else y

    def seen_classes(self) -> int:
        """How many classes the labels hold."""
        return int((self.classes.sum(0) > 0).sum())

    def chance(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Score ``[R]`` of the best answer that is the same for all samples, for group weights ``[R, K]`` (None: all once).

        For a function: its mean over outputs that are shuffled against the labels.
        """
        weights = np.ones((1, self.groups)) if weights is None else weights
        metric = self.task.metric
        if self.task.score is not None:
            return np.full(len(weights), float(np.mean(self._shuffled())))
        if metric in RANKED:
            return np.full(len(weights), 0.5)
        if metric == "r2":
            return np.zeros(len(weights))
        if metric == "accuracy":
            counts = weights @ self.classes
            return counts.max(1) / counts.sum(1)
        found = []  # the labels that are given to all: the most frequent ones, as many as pay
        n = weights @ self.rows
        for counts, rows in zip(weights @ self.truth[:, :, 0], n, strict=True):
            best = np.cumsum(np.sort(counts)[::-1])
            found.append(float((2 * best / (rows * np.arange(1, len(best) + 1) + counts.sum())).max()))
        return np.array(found)

    def chance_error(self) -> float:
        """Standard error of the score of such a model on as many samples: binomial, rank sum, 1/n of an R²."""
        n, chance = float(self.rows.sum()), float(self.chance()[0])
        if self.task.score is not None:
            return float(np.std(self._shuffled(), ddof=1))
        if self.task.metric == "r2":
            return 1 / n
        if self.task.metric == "concordance":  # Kendall's τ of the events, τ = 2 C − 1
            events = max(2.0, float(self.truth[:, 1, 0].sum()))
            return math.sqrt(2 * (2 * events + 5) / (9 * events * (events - 1))) / 2
        if self.task.metric in RANKED:  # of several labels at most the mean
            positive, negative = self._counts(np.ones((1, self.groups)))
            with np.errstate(divide="ignore"):
                return float(np.mean(np.sqrt((n + 1) / (12 * positive * negative))[positive * negative > 0]))
        return math.sqrt(chance * (1 - chance) / n)

    def scores(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Condition -> score ``[R]`` for group weights ``[R, K]``; NaN where a draw lacks a class."""
        metric = self.task.metric
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.task.score is not None:
                return self._by_function(weights)
            if metric in RANKED:
                found = {n: np.einsum("rk,lkm,rm->lr", weights, w, weights) for n, w in self._wins().items()}
                pairs = found.pop("", None)
                if pairs is None:
                    pairs = np.prod(self._counts(weights), 0)
                return {n: _mean_known(w / pairs) for n, w in found.items()}
            sums = np.einsum("rg,kgh->krh", weights, self.hits)
            if metric == "accuracy":
                found = sums[:, :, 0] / (weights @ self.rows)
            elif metric == "f1":
                actual = (weights @ self.truth[:, :, 0]).sum(1)
                found = 2 * sums[:, :, 0] / (sums[:, :, 1] + actual)
            else:
                n = (weights @ self.rows)[:, None]
                y, yy = (weights @ self.truth[:, : self.task.outputs, i] for i in (0, 1))
                spread = yy - y**2 / n
                found = (1 - sums / spread).mean(2)
        return {name: found[k] for name, k in self.index.items()}

    def whole(self) -> float:
        """The score with all modalities."""
        return float(self.scores(np.ones((1, self.groups)))[self._full][0])

    def total_effects(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Condition "shuffled.I" -> how far it moves the answers, ``E‖f(x) − f(x')‖² / (2 Σ Var f)``, ``[R]``.

        The total-effect index by the estimator of Jansen (1999): 0 where nothing moves, 1 where nothing else matters. It is that of
        variance decomposition where modalities are independent.
        """
        n = weights @ self.rows
        mean = (weights @ self.total) / n[:, None]
        variance = ((weights @ self.squared) / n[:, None] - mean**2).sum(1)
        floor = 1e-12 * (weights @ self.squared).sum(1) / n
        found = {}
        for name, k in self.index.items():
            if name.startswith("shuffled"):
                moved = (weights @ self.moved[k]) / n
                found[name] = np.where(variance > floor, moved / (2 * np.maximum(variance, 1e-300)), 0.0)
        return found

    def _counts(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positives and negatives ``[L, R]`` of each label."""
        if self.task.kind == "classes":
            return (weights @ self.classes[:, 1])[None], (weights @ self.classes[:, 0])[None]
        positive = (weights @ self.truth[:, : self.task.outputs, 0]).T
        return positive, weights @ self.rows - positive

    def _wins(self) -> dict[str, np.ndarray]:
        """Condition -> pairs of groups ranked rightly ``[L, K, K]``, the mean over its draws; "": comparable pairs of survival times."""
        if self._pairs is None:
            survival = self.task.metric == "concordance"
            found = self._survival_pairs() if survival else np.stack([r.pairs() for r in self.ranked], 1)
            names = ([("", 0)] if survival else []) + self.drawn
            self._pairs = {name: np.zeros(found.shape[1:]) for name, _ in names}
            for (name, _), pairs in zip(names, found, strict=True):
                self._pairs[name] += pairs / self.conditions.get(name, 1)
        return self._pairs

    def _survival_pairs(self) -> np.ndarray:
        """``[1 + S, 1, K, K]``: pairs that are comparable, then those that each condition ranks rightly, of the kept rows."""
        margins, labels, places = (self.kept.columns[name].numpy() for name in ("margins", "labels", "places"))
        member = np.eye(self.groups, dtype=np.float32)[places]
        found = np.zeros((1 + margins.shape[1], 1, self.groups, self.groups))
        for slot in range(margins.shape[1]):
            for rows, comparable, concordant in comparable_pairs(labels, margins[:, slot]):
                found[1 + slot, 0] += member[rows].T @ (concordant @ member)
                if slot == 0:
                    found[0, 0] += member[rows].T @ (comparable @ member)
        return found

    def _by_function(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        columns = self.kept.columns
        places = columns["places"].numpy()
        if self.task.kind == "pairs":  # a pair that is drawn twice is no second candidate
            return self._by_pair(weights[:, places])
        found = {name: np.zeros(len(weights)) for name in self.conditions}
        for r, row in enumerate(weights):
            chosen = torch.from_numpy(np.repeat(np.arange(len(places)), row[places].astype(int)))
            score = self.task.evaluate if (row == 1).all() else self.task.evaluate_drawn
            for name, draw in self.drawn:
                value = score(columns[f"{name}/{draw}"][chosen], columns["labels"][chosen])
                found[name][r] += value / self.conditions[name]
        return found

    def _by_pair(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        """Recall among all kept pairs, for weights of pairs ``[R, N]``."""
        found, k = {name: np.zeros(len(weights)) for name in self.conditions}, int(self.task.metric.split("@")[1])
        for name, draw in self.drawn:
            hits = recalled(self.kept.columns[f"{name}/{draw}"], k).numpy()
            found[name] += weights @ hits / weights.sum(1) / self.conditions[name]
        return found

    def _shuffled(self) -> list[float]:
        score, columns = self.task.score, self.kept.columns
        assert score is not None
        outputs, labels = columns[f"{self._full}/0"], columns["labels"]
        random = torch.Generator().manual_seed(0)
        orders = [torch.randperm(len(labels), generator=random) for _ in range(_SHUFFLES)]
        if self.task.kind == "pairs":
            queries, candidates = outputs.chunk(2, 1)
            return [float(score(torch.cat([queries, candidates[order]], 1), labels)) for order in orders]
        return [float(score(outputs[order], labels)) for order in orders]

    def to_state(self) -> dict[str, Any]:
        """What :meth:`load_state` goes on from: tensors and lists of such."""
        arrays = {name: torch.from_numpy(getattr(self, name).copy()) for name in _SUMS}
        return arrays | {"ranked": [ranked.to_state() for ranked in self.ranked], "kept": self.kept.to_state()}

    def load_state(self, state: dict[str, Any]) -> None:
        for name in _SUMS:
            setattr(self, name, state[name].numpy().copy())
        for ranked, stored in zip(self.ranked, state["ranked"], strict=True):
            ranked.load_state(stored)
        self.kept.load_state(state["kept"])


def _mean_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is no NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known, values, 0.0).sum(0) / known.sum(0)
