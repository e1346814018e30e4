"""Methods side by side: mean ± s.d. over seeds, intervals, and which differences are significant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from mmc_fast.diagnose.statistics import (
    ResampledScores,
    average,
    mean_sd,
    resample_counts,
    resampled_scores,
    separated_best,
)
from mmc_fast.errors import InputError

COMPLETE = "complete"
AVERAGE = "mean missing"


@dataclass(frozen=True)
class Score:
    """A method's score under one condition. ``best``: its paired intervals against all other methods lie above 0, which
    one seed never decides.

    ``se``: standard error over seeds and test samples.
    """

    mean: float
    sd: float | None
    low: float
    high: float
    best: bool
    se: float


@dataclass(frozen=True)
class Difference:
    """Paired difference ``first − second`` under one condition, with its interval and the p-value of no difference.

    ``p`` is None with one seed, which says nothing about other trainings.
    """

    first: str
    second: str
    condition: str
    estimate: float
    low: float
    high: float
    p: float | None


@dataclass(frozen=True)
class Comparison:
    """``scores[method][condition]``; the differences hold every ordered pair of methods under every condition."""

    dataset: str
    metric: str
    seeds: tuple[int, ...]
    level: float
    resamples: int
    conditions: tuple[str, ...]
    scores: Mapping[str, Mapping[str, Score]]
    differences: tuple[Difference, ...]

    def difference(self, first: str, second: str, condition: str) -> Difference:
        """The stored difference of two methods."""
        for entry in self.differences:
            if (entry.first, entry.second, entry.condition) == (first, second, condition):
                return entry
        raise InputError(f"no difference {first} − {second} under {condition!r} in this comparison")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare(
    dataset: str,
    metric: str,
    labels: ArrayLike,
    predictions: Mapping[str, Sequence[Mapping[float, ArrayLike]]],
    *,
    seeds: Sequence[int],
    level: float = 0.95,
    resamples: int = 1000,
    generator: np.random.Generator,
) -> Comparison:
    """Compare methods on one test set.

    ``predictions[method][s][rate]``: predictions of seed ``seeds[s]`` at a nominal missing rate, 0.0 for complete data,
    as in ``statistics.weighted_scores``. All methods share seeds, rates and the test samples drawn.
    """
    rates = [tuple(by_rate) for runs in predictions.values() for by_rate in runs]
    if not rates or len(set(rates)) > 1 or rates[0][0] != 0.0:
        raise InputError(
            f"{dataset}: the runs were not scored at the same missing rates with 0 first, got {set(rates)}"
        )
    if any(len(runs) != len(seeds) for runs in predictions.values()):
        raise InputError(f"{dataset}: every method needs one run for each of the seeds {list(seeds)}")
    drawn = resample_counts(len(np.asarray(labels)), resamples, generator)
    counts = np.asfortranarray(drawn, dtype=np.float64)  # once, in the layout that the scores read
    by_method: dict[str, dict[str, ResampledScores]] = {}
    for method, runs in predictions.items():
        scored = {
            _condition(rate): resampled_scores(metric, labels, [run[rate] for run in runs], counts) for rate in rates[0]
        }
        missing = [scores for condition, scores in scored.items() if condition != COMPLETE]
        by_method[method] = scored | ({AVERAGE: average(missing)} if missing else {})

    conditions = tuple(next(iter(by_method.values())))
    several = len(seeds) > 1
    best = {c: separated_best({m: s[c] for m, s in by_method.items()}, level) if several else None for c in conditions}
    scores = {
        method: {c: _score(scored[c], level, best[c] == method) for c in conditions}
        for method, scored in by_method.items()
    }
    differences = tuple(
        _difference(first, second, c, by_method[first][c] - by_method[second][c], level)
        for c in conditions
        for first in by_method
        for second in by_method
        if first != second
    )
    return Comparison(dataset, metric, tuple(seeds), level, resamples, conditions, scores, differences)


def _condition(rate: float) -> str:
    return COMPLETE if rate == 0 else f"{rate:g} missing"


def _score(scores: ResampledScores, level: float, best: bool) -> Score:
    mean, sd = mean_sd(scores.plain.tolist())
    interval = scores.interval(level)
    return Score(mean, sd, interval.low, interval.high, best, interval.se)


def _difference(first: str, second: str, condition: str, scores: ResampledScores, level: float) -> Difference:
    interval = scores.interval(level)
    p = interval.p_zero if len(scores.plain) > 1 else None
    return Difference(first, second, condition, interval.estimate, interval.low, interval.high, p)
