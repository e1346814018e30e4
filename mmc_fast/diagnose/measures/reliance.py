"""Reliance on the data side: what a fused model scores with some modalities taken away, and each one's fair share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

from ..statistics import resample_counts, resampled_scores

__all__ = [
    "Afresh",
    "coalition_outputs",
    "coalitions",
    "shapley_values",
    "train_afresh",
]

Rows = tuple[Mapping[str, Tensor], Tensor]

_NETWORKS = 3
MAX_MODALITIES = 6
"""Exact Shapley values need a score for each of the 2^m coalitions."""


def coalitions(m: int) -> list[tuple[bool, ...]]:
    """All ``2^m`` coalitions of m modalities; entry i of coalition c is bit i of c. The last one holds all."""
    if not 1 <= m <= MAX_MODALITIES:
        raise InputError(
            f"coalitions: {m} modalities; exact values are for 1 to {MAX_MODALITIES}, group some of them into one"
        )
    return [tuple(bool(c >> i & 1) for i in range(m)) for c in range(2**m)]


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


@torch.no_grad()
def coalition_outputs(
    fuse: Callable[[dict[str, Tensor]], Tensor],
    features: Mapping[str, Tensor],
    stand_in: Mapping[str, Tensor],
) -> Tensor:
    """Logits of every coalition: ``[2^m, B, C]``, modalities outside of it replaced by ``stand_in`` (broadcast to rows).

    "all" is the last, "none" the first, "without i" all but bit i, "only i" bit i alone. 2^m calls of ``fuse``.
    Limits: a mean is a place where the model may never have been, so a low "only" is partly surprise; compare with
    a network retrained without it (:func:`train_afresh`), or with a model trained with modality dropout.
    """
    names = list(features)
    outputs = []
    for members in coalitions(len(names)):
        chosen = {
            name: x if inside else stand_in[name].to(x).expand_as(x)
            for inside, (name, x) in zip(members, features.items(), strict=True)
        }
        outputs.append(fuse(chosen))
    return torch.stack(outputs)


@dataclass(frozen=True)
class Afresh:
    """Held-out score of a small network trained afresh, and its standard error over the held-out rows (bootstrap)."""

    score: float
    error: float


def train_afresh(
    features: Mapping[str, Tensor],
    labels: Tensor,
    names: Sequence[str],
    *,
    metric: str = "accuracy",
    hidden: int = 64,
    held_out: float = 0.3,
    max_iter: int = 60,
    seed: int = 0,
    judged: Rows | None = None,
) -> Afresh:
    """Held-out score of one hidden ReLU layer on the named features ``[N, ...]``, or of the class shares for no name.

    With one name: what a modality allows by itself. With all but one: the fair control for "without", a network that never saw
    the modality; where it loses nothing either, the modality is redundant rather than lost.

    The mean probability of three networks: Adam, L2 penalty 1, early stopping on a tenth of the training rows (scikit-learn),
    on standardised features. ``held_out`` of the rows judge, or all the ``judged`` (features, labels) where given, and then every row here trains. ``metric``:
    "accuracy", or "auroc" for labels 0 and 1. Raises InputError for a single class.
    """
    y = labels.cpu().numpy()
    rows = len(y)
    if len(np.unique(y)) < 2:
        raise InputError("train_afresh: the labels hold a single class; a network needs at least 2")
    if judged is None:
        order = np.random.default_rng(seed).permutation(rows)
        cut = round(rows * (1 - held_out))
        train, test = order[:cut], order[cut:]
    else:
        y = np.concatenate([y, judged[1].cpu().numpy()])
        features = {name: torch.cat([features[name].flatten(1), judged[0][name].flatten(1)]) for name in names}
        train, test = np.arange(rows), np.arange(rows, len(y))
    if len(np.unique(y[train])) < 2 or (metric == "auroc" and len(np.unique(y[test])) < 2):
        raise InputError(f"train_afresh: {rows} rows leave a single class in a part; give more samples")
    classes, counts = np.unique(y[train], return_counts=True)
    if names:
        x = np.concatenate([features[name].detach().flatten(1).double().cpu().numpy() for name in names], 1)
        # The stopping rows are drawn by class, which needs enough of each.
        probability = _fitted(x, y, train, test, hidden, bool(counts.min() >= 20), max_iter, seed)
    else:
        probability = np.tile(counts / counts.sum(), (len(test), 1))
    predicted = probability[:, 1] if metric == "auroc" else classes[probability.argmax(1)]
    draws = resample_counts(len(test), 100, np.random.default_rng([seed, 1]))
    scored = resampled_scores(metric, y[test], [predicted], draws)
    return Afresh(float(scored.plain[0]), float(np.nanstd(scored.resampled[0], ddof=1)))


def _fitted(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, hidden: int, stop: bool, max_iter: int, seed: int
) -> np.ndarray:
    """Summed class probabilities of the networks on the rows ``test``."""
    require("sklearn", extra="diagnose")
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.neural_network import MLPClassifier
    from sklearn.preprocessing import StandardScaler

    x = StandardScaler().fit(x[train]).transform(x)
    probability = np.zeros((len(test), len(np.unique(y[train]))))
    for start in range(_NETWORKS):
        network = MLPClassifier((hidden,), alpha=1.0, early_stopping=stop, max_iter=max_iter, random_state=seed + start)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            probability += network.fit(x[train], y[train]).predict_proba(x[test])
    return probability
