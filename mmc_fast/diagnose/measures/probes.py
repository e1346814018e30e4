"""Questions that need a small model trained on representations: what is in them, and what was lost in fusion."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from mmc_fast._util.seeds import generator
from mmc_fast.errors import InputError
from mmc_fast.experiments.training.adversarial import judge_rows

__all__ = [
    "PrefixGap",
    "ProbeScore",
    "denoising_r2",
    "fresh_discriminator",
    "linear_probe",
    "noise_component",
    "prefix_gap",
]


@dataclass(frozen=True)
class ProbeScore:
    """Held-out accuracy of a probe, its binomial standard error, and the share of the largest class."""

    accuracy: float
    standard_error: float
    chance: float
    rows: int


def linear_probe(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, c: float = 1.0) -> ProbeScore:
    """Held-out accuracy of a logistic regression on standardised features ``[N, p]`` with labels ``[N]``.

    ``c``: inverse strength of the L2 penalty (scikit-learn's C). Raises InputError for one class or shapes that do not
    fit. Limits: linear, so it says what can be read off, not all that is there.
    """
    model = _fit_logistic(train_x, train_y, c)
    correct = model.predict(_array(test_x)) == np.asarray(test_y)
    return _probe_score(correct, np.asarray(test_y))


@dataclass(frozen=True)
class PrefixGap:
    """``gap = own − fused`` with the standard error of the paired difference."""

    fused: ProbeScore
    own: ProbeScore
    gap: float
    standard_error: float


def prefix_gap(
    fused_train: Tensor,
    fused_test: Tensor,
    own_train: Tensor,
    own_test: Tensor,
    train_y: Tensor,
    test_y: Tensor,
    *,
    c: float = 1.0,
) -> PrefixGap:
    """What an encoder failed to learn through fusion: linear probe on two encoders of one modality, same rows.

    ``fused_*``: features ``[N, p]`` of the encoder trained only through the fused loss; ``own_*``: of the same encoder
    trained also on its own loss. A positive gap: fusion starved it. Source: figure 4 of the collapse paper.
    """
    truth = np.asarray(test_y)
    hits = []
    for train, test in ((fused_train, fused_test), (own_train, own_test)):
        hits.append(_fit_logistic(train, train_y, c).predict(_array(test)) == truth)
    difference = hits[1].astype(float) - hits[0].astype(float)
    error = float(difference.std(ddof=1) / math.sqrt(len(truth))) if len(truth) > 1 else math.nan
    return PrefixGap(_probe_score(hits[0], truth), _probe_score(hits[1], truth), float(difference.mean()), error)


def noise_component(representation: Tensor, labels: Tensor) -> Tensor:
    """What the label does not explain: rows ``[N, p]`` minus the mean of their class, float64."""
    if len(representation) != len(labels):
        raise InputError(f"noise_component: {len(representation)} rows and {len(labels)} labels; give one label a row")
    x, result = representation.double(), torch.empty_like(representation, dtype=torch.float64)
    for label in labels.unique():
        rows = labels == label
        result[rows] = x[rows] - x[rows].mean(0)
    return result


def denoising_r2(student: Tensor, teacher: Tensor, *, folds: int = 5, ridge: float = 1.0, seed: int = 0) -> float:
    """Held-out R² of predicting the teacher's noise ``[N, q]`` from the student's ``[N, p]`` (ridge, k folds).

    The denoising conjecture says that after distillation one is a transform of the other: then R² is near 1; 0 or less
    means no linear relation. Give noise components (:func:`noise_component`, or representations of noise alone). Columns
    count by their variance; columns of the student are standardised before the penalty.
    Source: slides of the collapse paper. Limits: linear relations only.
    """
    if student.dim() != 2 or teacher.dim() != 2 or len(student) != len(teacher) or len(student) < 2 * folds:
        raise InputError(
            f"denoising_r2: student {list(student.shape)}, teacher {list(teacher.shape)}, {folds} folds; give [N, p] and "
            "[N, q] of the same rows with N at least twice the folds"
        )
    x, y = _array(student), _array(teacher)
    if not np.any(y.std(0) > 0):
        return math.nan
    split = KFold(folds, shuffle=True, random_state=seed)
    predicted = cross_val_predict(make_pipeline(StandardScaler(), Ridge(alpha=ridge)), x, y, cv=split)
    return float(r2_score(y, predicted, multioutput="variance_weighted"))


def fresh_discriminator(
    latents: Mapping[str, Tensor], *, hidden: Sequence[int] = (512, 256), seed: int = 0, rows: int = 4096
) -> dict[str, Any]:
    """Can a new discriminator name the modality of a latent? ``latents``: name -> ``[N, k]``, row n of one sample.

    Half of the samples train it (to convergence, stopped on a fifth of them), the other half judges it. Returns
    "balanced_accuracy" (near "chance" = 1/m: the latents do not tell their modality), "epochs", "converged", "rows".
    At most ``rows`` samples train, as many judge. Source: the sanity check of METHOD, section 2.
    Limits: one architecture; failing to find a difference is no proof that there is none.
    """
    tensors = [x.detach().float() for x in latents.values()]
    if len(tensors) < 2 or len({tuple(x.shape) for x in tensors}) > 1 or len(tensors[0]) < 20:
        shapes = {name: list(x.shape) for name, x in latents.items()}
        raise InputError(
            f"fresh_discriminator: latents are {shapes}; give two or more modalities of one [N, k], N >= 20"
        )
    order = torch.randperm(len(tensors[0]), generator=generator(seed, "fresh", "split"))
    half = min(len(order) // 2, rows)
    parts = []
    for chosen in (order[:half], order[half : 2 * half]):
        x = torch.cat([t[chosen] for t in tensors])
        modality = torch.arange(len(tensors)).repeat_interleave(half)
        parts.append((x, modality, torch.arange(half).repeat(len(tensors))))
    (x, y, sample), (held_x, held_y, _) = parts
    random = generator(seed, "fresh", "order")
    return judge_rows(x, y, sample, held_x, held_y, hidden, len(tensors), seed, random)


def _fit_logistic(x: Tensor, y: Tensor, c: float) -> Any:
    features, labels = _array(x), np.asarray(y)
    if features.ndim != 2 or len(features) != len(labels):
        raise InputError(f"probe: features {list(features.shape)} and {len(labels)} labels; give [N, p] and [N]")
    if len(np.unique(labels)) < 2:
        raise InputError("probe: the training labels hold a single class; a probe needs at least 2")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=300))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near the optimum is good enough for a probe
        return model.fit(features, labels)


def _probe_score(correct: np.ndarray, labels: np.ndarray) -> ProbeScore:
    n, accuracy = len(labels), float(correct.mean())
    _, counts = np.unique(labels, return_counts=True)
    return ProbeScore(accuracy, math.sqrt(accuracy * (1 - accuracy) / n), float(counts.max() / n), n)


def _array(x: Tensor) -> np.ndarray:
    if not torch.isfinite(x).all():
        raise InputError("probe: the features hold NaN or infinite values; remove such rows first")
    return x.detach().double().cpu().numpy()
