"""Reliance on the data side: what a fused model scores with some modalities taken away, and each one's fair share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

from ..statistics import resample_counts, resampled_scores
from ..tasks import Task

Rows = tuple[Mapping[str, Tensor], Tensor]

_NETWORKS = 3
MAX_MODALITIES = 6
"""Exact Shapley values need a score for each of the 2^m coalitions."""


def shapley_values(scores: Sequence[float] | np.ndarray) -> np.ndarray:
    """Exact Shapley values ``[m]`` from the scores of all coalitions ``[2^m]`` (or ``[2^m, R]`` -> ``[m, R]``).

    ``φ_i = Σ_{S ∌ i} |S|! (m−|S|−1)! / m! · (v(S ∪ i) − v(S))``. They add up to ``v(all) − v(none)``; modalities that are
    interchangeable get the same. Bit i of the position says whether modality i is in. Time ``O(m 2^m)``.
    Source: Shapley 1953. Limits: depends on what stands in for an absent modality.
    """
    v = np.asarray(scores, dtype=np.float64)
    m = round(math.log2(len(v))) if len(v) else 0
    if m < 1 or len(v) != 2**m or m > MAX_MODALITIES:
        raise InputError(f"shapley_values: got {len(v)} scores; give 2^m of them, m from 1 to {MAX_MODALITIES}")
    values = np.zeros((m, *v.shape[1:]))
    for c in range(2**m):
        size = c.bit_count()
        for i in range(m):
            if not c >> i & 1:
                weight = math.factorial(size) * math.factorial(m - size - 1) / math.factorial(m)
                values[i] += weight * (v[c | 1 << i] - v[c])
    return values


@dataclass(frozen=True)
class Afresh:
    """Held-out score of a small network trained afresh, its standard error (bootstrap), its outputs ``[n, C]`` and their rows."""

    score: float
    error: float
    outputs: Tensor
    rows: Tensor


def train_afresh(
    features: Mapping[str, Tensor],
    labels: Tensor,
    names: Sequence[str],
    *,
    task: Task | None = None,
    hidden: int = 64,
    held_out: float = 0.3,
    max_iter: int = 60,
    seed: int = 0,
    judged: Rows | None = None,
) -> Afresh:
    """Held-out score of one hidden ReLU layer on the named features ``[N, ...]``, or of the class shares for no name.

    With one name: what a modality allows by itself. With all but one: the fair control for "without", a network that never saw
    the modality; where it loses nothing either, the modality is redundant rather than lost.

    The mean of three networks: Adam, L2 penalty 1, early stopping on a tenth of the training rows (scikit-learn), on standardised
    features. ``held_out`` of the rows judge, or all the ``judged`` (features, labels) where given, and then every row here trains.
    ``task``: kind of the labels and their score; None: classes and accuracy. Raises InputError for a single class.
    """
    rows = len(labels)
    task = task or Task("classes", "accuracy", int(labels.max()) + 1)
    y = labels.cpu().numpy()
    if task.kind == "survival":
        raise InputError("train_afresh: there is no network for survival times; give scores of models of your own")
    if task.kind == "classes" and len(np.unique(y)) < 2:
        raise InputError("train_afresh: the labels hold a single class; a network needs at least 2")
    if judged is None:
        order = np.random.default_rng(seed).permutation(rows)
        cut = round(rows * (1 - held_out))
        train, test = order[:cut], order[cut:]
    else:
        y = np.concatenate([y, judged[1].cpu().numpy()])
        features = {name: torch.cat([features[name].flatten(1), judged[0][name].flatten(1)]) for name in names}
        train, test = np.arange(rows), np.arange(rows, len(y))
    if task.kind == "classes" and (
        len(np.unique(y[train])) < 2 or (task.metric == "auroc" and len(np.unique(y[test])) < 2)
    ):
        raise InputError(f"train_afresh: {rows} rows leave a single class in a part; give more samples")
    x = [features[name].detach().flatten(1).double().cpu().numpy() for name in names]
    outputs = _fitted(
        np.concatenate(x, 1) if x else np.zeros((len(y), 0)), y, train, test, hidden, max_iter, seed, task
    )
    given, rows_of = torch.from_numpy(outputs).float(), torch.from_numpy(test if judged is None else test - rows)
    draws = resample_counts(len(test), 100, np.random.default_rng([seed, 1]))
    if task.metric in ("accuracy", "auroc") and task.score is None:
        predicted = outputs[:, 1] if task.metric == "auroc" else outputs.argmax(1)
        scored = resampled_scores(task.metric, y[test], [predicted], draws)
        return Afresh(float(scored.plain[0]), float(np.nanstd(scored.resampled[0], ddof=1)), given, rows_of)
    truth = torch.from_numpy(y[test])
    plain = task.evaluate(given, truth)
    again = [np.repeat(np.arange(len(test)), counts.astype(int)) for counts in np.asarray(draws)]
    error = float(np.nanstd([task.evaluate_drawn(given[i], truth[i]) for i in again], ddof=1))
    return Afresh(plain, error, given, rows_of)


def _fitted(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, hidden: int, max_iter: int, seed: int, task: Task
) -> np.ndarray:
    """Mean outputs of the networks on the rows ``test``, ``[N, C]``: log-odds of labels, numbers, probabilities of classes."""
    if not x.shape[1]:
        if task.kind == "classes":
            shares = np.bincount(y[train], minlength=task.outputs) / len(train)
            return np.tile(shares, (len(test), 1))
        mean = y[train].mean(0)
        return np.tile(mean - 0.5 if task.kind == "labels" else mean, (len(test), 1))
    require("sklearn", extra="diagnose")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit(x[train]).transform(x)
    seen = np.unique(y[train]) if task.kind == "classes" else np.arange(y.shape[1])
    # The stopping rows are drawn by class, which needs enough of each.
    stop = (np.unique(y[train], return_counts=True)[1].min() if task.kind == "classes" else len(train)) >= 20
    width = max(2, task.outputs) if task.kind == "classes" else y.shape[1]
    found = np.zeros((len(x), width))
    numbers = task.kind == "numbers"
    centre, spread = (y[train].mean(0), y[train].std(0) + 1e-12) if numbers else (0.0, 1.0)
    for start in range(_NETWORKS):
        kind = MLPRegressor if numbers else MLPClassifier
        network = kind(
            hidden_layer_sizes=(hidden,),
            alpha=1.0,
            early_stopping=bool(stop),
            max_iter=max_iter,
            random_state=seed + start,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            if numbers:
                target = (y[train] - centre) / spread
                network.fit(x[train], target[:, 0] if target.shape[1] == 1 else target)
                found += network.predict(x).reshape(len(x), -1) * spread + centre
            else:
                network.fit(x[train], y[train])
                found[:, seen] += network.predict_proba(x)
    found /= _NETWORKS
    if task.kind != "labels":
        return found[test]
    cut = _best_cut(found[train], y[train]) if task.metric == "f1" else 0.5
    odds = np.clip(found[test], 1e-6, 1 - 1e-6)
    return np.log(odds / (1 - odds)) - math.log(cut / (1 - cut))


def _best_cut(found: np.ndarray, y: np.ndarray) -> float:
    """The probability, common to all labels, above which they are given for the best F1: one half is too high for rare labels."""
    order = np.argsort(-found, axis=None)
    hits, p = np.cumsum(y.reshape(-1)[order]), found.reshape(-1)[order]
    best = int((hits / (np.arange(1, len(p) + 1) + y.sum())).argmax())  # half of F1
    return float(np.clip((p[best] + p[min(best + 1, len(p) - 1)]) / 2, 1e-6, 1 - 1e-6))
