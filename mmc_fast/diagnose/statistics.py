"""Uncertainty of scores: spread over seeds, bootstrap over test samples, and paired comparisons of methods.

The resampled scores are computed for all resamples at once from sample weights (a resample is a vector of counts);
calling a metric once per resample would be hundreds of times slower. The values are those of scikit-learn with
``sample_weight``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

Floats = NDArray[np.float64]
METRICS = ("accuracy", "auroc", "auprc", "macro_auroc", "r2", "concordance")
_BLOCK = 64  # resamples at a time, so that the work arrays of thousands of samples stay in cache


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval of a score or of a difference of scores.

    ``sd_seeds`` and ``sd_samples`` are the standard errors of its two parts; ``sd_seeds`` is None with one seed, and
    the interval then speaks of this one training run only. ``p_zero`` is the two-sided p-value of the value 0 under the
    same t distribution.
    """

    estimate: float
    low: float
    high: float
    level: float
    seeds: int
    sd_seeds: float | None
    sd_samples: float
    p_zero: float = math.nan

    @property
    def se(self) -> float:
        """Standard error of both parts together."""
        return math.hypot(self.sd_seeds or 0.0, self.sd_samples)

    def excludes(self, value: float) -> bool:
        """Whether ``value`` lies outside the interval."""
        return value < self.low or value > self.high


def mean_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (ddof = 1; None for a single value)."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise InputError(f"mean_sd: got values of shape {array.shape}; give a non-empty list of numbers")
    return float(array.mean()), (float(array.std(ddof=1)) if array.size > 1 else None)


def resample_counts(n: int, resamples: int, generator: np.random.Generator) -> NDArray[np.int64]:
    """How often each of ``n`` samples is drawn in each bootstrap resample. Returns [resamples, n], rows sum to n."""
    if n < 1 or resamples < 2:
        raise InputError(f"resample_counts: got n={n}, resamples={resamples}; need n >= 1 and resamples >= 2")
    return generator.multinomial(n, np.full(n, 1.0 / n), size=resamples)


def weighted_scores(metric: str, labels: ArrayLike, predictions: ArrayLike, weights: ArrayLike) -> Floats:
    """Score of one set of predictions under many sample weightings.

    ``labels`` [N], or [N, L] under ``macro_auroc`` (0/1) and ``r2``, [N, 2] = time and event (0: censored) under ``concordance``;
    ``predictions``: [N, L] under the first two, the risk [N] under the third, else [N] scores of the positive class or [N, C] probabilities or logits (``accuracy``:
    predicted classes [N] or scores [N, C]; ``auroc`` and ``auprc``: column 1 of [N, 2]); ``weights`` [R, N],
    non-negative. Returns [R]; NaN where a weighting leaves a class empty. Raises ``InputError`` for an unknown metric
    or sizes that differ.
    """
    y = np.asarray(labels)
    scores = np.asarray(predictions)
    w = np.atleast_2d(np.asarray(weights, dtype=np.float64))
    if metric not in METRICS:
        raise InputError(f"unknown metric {metric!r}; known are {', '.join(METRICS)}")
    if metric == "concordance":
        scores = scores.reshape(len(scores))
    if (
        y.ndim != 1 + (metric in ("macro_auroc", "r2", "concordance"))
        or scores.shape[:1] != y.shape[:1]
        or w.shape[1:] != y.shape[:1]
    ):
        raise InputError(
            f"weighted_scores: got labels {y.shape}, predictions {scores.shape}, weights {w.shape}; "
            "need [N], [N] or [N, C], and [R, N] with one N"
        )
    if metric == "r2":
        total = w.sum(1, keepdims=True)
        centred = y - y.mean(0, dtype=np.float64)  # their squares would cancel far from 0
        spread = w @ centred**2 - (w @ centred) ** 2 / total
        return (1 - (w @ (y - scores) ** 2) / spread).mean(1)
    if metric == "concordance":
        return _concordance(y, scores, w)
    if metric == "macro_auroc":
        each = [weighted_scores("auroc", y[:, j], scores[:, j], w) for j in range(y.shape[1])]
        return np.nanmean(np.stack(each), 0)
    if metric == "accuracy":
        predicted = scores.argmax(axis=1) if scores.ndim == 2 else scores
        return w @ (predicted == y).astype(np.float64) / w.sum(axis=1)
    if scores.ndim == 2:
        if scores.shape[1] != 2:
            raise InputError(f"{metric} needs two classes, got predictions with {scores.shape[1]} columns")
        scores = scores[:, 1]
    if not np.isin(y, (0, 1)).all():
        raise InputError(f"{metric} needs labels 0 and 1, got {np.unique(y)[:5].tolist()}")
    blocks = (w[i : i + _BLOCK] for i in range(0, len(w), _BLOCK))
    return np.concatenate([_ranked_scores(metric, y, scores, block) for block in blocks])


def comparable_pairs(labels: NDArray, risk: NDArray) -> Iterator[tuple[NDArray, NDArray, NDArray]]:
    """Pairs of a sample with an event and one that outlived it, a block of the former at a time.

    Yields rows ``[b]``, which pairs are comparable ``[b, N]`` and how they are ranked by ``risk`` ``[N]``: 1 in the right order,
    1/2 for equal risk (Harrell et al. 1982; a sample that is censored at the time of an event outlived it).
    """
    time, event = labels[:, 0], labels[:, 1] == 1
    rows = np.flatnonzero(event)
    size = max(1, (1 << 22) // max(1, len(time)))
    for start in range(0, len(rows), size):
        some = rows[start : start + size]
        longer = (time[some, None] < time) | ((time[some, None] == time) & ~event)
        ranked = (risk[some, None] > risk) + 0.5 * (risk[some, None] == risk)
        yield some, longer.astype(np.float32), (ranked * longer).astype(np.float32)


def _concordance(y: NDArray, risk: NDArray, w: Floats) -> Floats:
    """Concordant over comparable pairs, a pair counting the product of its weights."""
    weights = w.T.astype(np.float32)
    right, pairs = np.zeros(len(w)), np.zeros(len(w))
    for rows, comparable, concordant in comparable_pairs(y, risk):
        right += (weights[rows] * (concordant @ weights)).sum(0, dtype=np.float64)
        pairs += (weights[rows] * (comparable @ weights)).sum(0, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return right / pairs


def _ranked_scores(metric: str, y: NDArray, scores: NDArray, w: Floats) -> Floats:
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    # Samples along the first axis: one gather and one running sum serve all resamples, in contiguous rows.
    ordered = np.ascontiguousarray(w.T)[order]  # [N, R]
    positive = ordered * (y[order] == 1)[:, None]
    negative = ordered - positive
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]])
    if len(starts) < len(ranked):  # tied scores form one group
        positive, negative = (np.add.reduceat(part, starts, axis=0) for part in (positive, negative))
    true_positive = positive.cumsum(axis=0)
    total_positive = true_positive[-1]
    with np.errstate(invalid="ignore", divide="ignore"):
        if metric == "auroc":
            above = true_positive - positive / 2  # half of a tie counts
            return np.einsum("nr,nr->r", negative, above) / (total_positive * negative.sum(axis=0))
        flagged = true_positive + negative.cumsum(axis=0)
        precision = np.divide(true_positive, flagged, out=np.zeros_like(flagged), where=flagged > 0)
        return np.einsum("nr,nr->r", positive, precision) / total_positive


@dataclass(frozen=True)
class ResampledScores:
    """Scores of one method on one test set: ``plain`` [S] per seed, ``resampled`` [S, R] per seed and resample.

    Differences and averages are meaningful between objects made with the same ``counts``: they stay paired over
    seeds and over test samples.
    """

    plain: Floats
    resampled: Floats

    def __sub__(self, other: ResampledScores) -> ResampledScores:
        if self.resampled.shape != other.resampled.shape:
            raise InputError(
                f"paired scores need the same seeds and resamples, got {self.resampled.shape} "
                f"and {other.resampled.shape}"
            )
        return ResampledScores(self.plain - other.plain, self.resampled - other.resampled)

    def interval(self, level: float = 0.95) -> Interval:
        """Interval of the mean over training seeds, for one test set.

        The variance is the sum of the variance over seeds (divided by their number) and of the bootstrap variance over
        test samples; the quantile is Student's t with the degrees of freedom of Welch and Satterthwaite, so that three
        seeds are not treated as many.
        """
        if not 0 < level < 1:
            raise InputError(f"level must lie between 0 and 1, got {level}")
        seeds = len(self.plain)
        # A resample of a small test set can lack a class; its score is undefined and says nothing.
        samples_variance = float(np.nanvar(self.resampled.mean(axis=0), ddof=1))
        seeds_variance = float(self.plain.var(ddof=1)) / seeds if seeds > 1 else 0.0
        variance = samples_variance + seeds_variance
        freedom = math.inf
        if seeds_variance > 0:
            freedom = variance**2 * (seeds - 1) / seeds_variance**2
        estimate = float(self.plain.mean())
        student = require("scipy.stats", extra="diagnose").t
        half = float(student.ppf((1 + level) / 2, freedom)) * math.sqrt(variance)
        if variance > 0:
            p_zero = 2 * float(student.sf(abs(estimate) / math.sqrt(variance), freedom))
        else:
            p_zero = float(estimate == 0)
        return Interval(
            estimate,
            estimate - half,
            estimate + half,
            level,
            seeds,
            math.sqrt(seeds_variance) if seeds > 1 else None,
            math.sqrt(samples_variance),
            p_zero,
        )


def resampled_scores(
    metric: str, labels: ArrayLike, predictions: Sequence[ArrayLike], counts: NDArray
) -> ResampledScores:
    """Score every seed's predictions on the test set and on its bootstrap resamples.

    ``predictions``: one array per seed, as in ``weighted_scores``; ``counts`` [R, N] from ``resample_counts``. Raises
    ``InputError`` where the score is undefined on the test set itself.
    """
    if len(predictions) == 0:
        raise InputError("resampled_scores: got no predictions; give one array per seed")
    ones = np.ones((1, counts.shape[1]))
    plain = np.array([weighted_scores(metric, labels, p, ones)[0] for p in predictions])
    if np.isnan(plain).any():
        raise InputError(f"{metric} is undefined here: the labels hold a single class")
    weights = np.asfortranarray(counts, dtype=np.float64)
    return ResampledScores(plain, np.stack([weighted_scores(metric, labels, p, weights) for p in predictions]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of a family of tests, in the order given: ``max_{j <= i} min(1, (n - j) p_(j))``, j from 0.

    Source: Holm, Scandinavian Journal of Statistics 1979.
    """
    n, adjusted, highest = len(p_values), [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (n - place) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def average(scores: Sequence[ResampledScores]) -> ResampledScores:
    """Mean over several conditions (such as missing rates) of one method, seed by seed and resample by resample."""
    if len(scores) == 0:
        raise InputError("average: got no scores")
    return ResampledScores(np.mean([s.plain for s in scores], axis=0), np.mean([s.resampled for s in scores], axis=0))


def separated_best(scores: Mapping[str, ResampledScores], level: float = 0.95) -> str | None:
    """The method whose paired interval against EVERY other method lies above 0, or None where no method has that.

    All comparisons must succeed at once, so the level needs no correction for their number.
    """
    if len(scores) < 2:
        return None
    best = max(scores, key=lambda name: float(scores[name].plain.mean()))
    others = (name for name in scores if name != best)
    separated = all((scores[best] - scores[name]).interval(level).low > 0 for name in others)
    return best if separated else None
