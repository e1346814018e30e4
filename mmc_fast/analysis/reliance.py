"""Reliance on the data side: what a fused model scores with some modalities taken away, and each one's fair share."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from ..errors import InputError

__all__ = ["RetrainedControl", "coalition_outputs", "coalitions", "retrained_without", "shapley_values"]

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
    :func:`retrained_without`, or with a model trained with modality dropout.
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
class RetrainedControl:
    """Held-out accuracies of small networks trained afresh: on all features, and for each modality without and alone."""

    all: float
    without: dict[str, float]
    alone: dict[str, float]
    rows: int


def retrained_without(
    features: Mapping[str, Tensor],
    labels: Tensor,
    *,
    hidden: int = 64,
    held_out: float = 0.3,
    max_iter: int = 60,
    seed: int = 0,
) -> RetrainedControl:
    """The fair control for "without": a network that never saw the modality, trained on the same frozen features.

    ``features``: name -> ``[N, d_i]``; one hidden ReLU layer of ``hidden`` units, Adam, early stopping on a tenth of the
    training rows (scikit-learn), on standardised features; ``held_out`` of the rows judge. If it loses nothing without a
    modality that the fused model also does without, the modality is redundant rather than lost. Trains 2 m + 1 networks.
    """
    y = labels.cpu().numpy()
    if len(np.unique(y)) < 2:
        raise InputError("retrained_without: the labels hold a single class; a control needs at least 2")
    order = np.random.default_rng(seed).permutation(len(y))
    cut = round(len(y) * (1 - held_out))
    train, test = order[:cut], order[cut:]
    arrays = {name: x.detach().flatten(1).double().cpu().numpy() for name, x in features.items()}

    def score(names: Sequence[str]) -> float:
        if not names:
            return float(np.bincount(y[test]).max() / len(test))
        x = np.concatenate([arrays[name] for name in names], 1)
        network = MLPClassifier((hidden,), early_stopping=True, max_iter=max_iter, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model = make_pipeline(StandardScaler(), network).fit(x[train], y[train])
        return float(model.score(x[test], y[test]))

    names = list(arrays)
    without = {name: score([n for n in names if n != name]) for name in names}
    return RetrainedControl(score(names), without, {name: score([name]) for name in names}, len(test))
