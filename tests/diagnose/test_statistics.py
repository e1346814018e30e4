"""Scores under resampling against scikit-learn, and intervals against their nominal coverage."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import accuracy_score, average_precision_score, r2_score, roc_auc_score

from mmc_fast.diagnose.estimates import affordable, interval, reliance_measures, resampled
from mmc_fast.diagnose.statistics import (
    ResampledScores,
    average,
    holm,
    mean_sd,
    resample_counts,
    resampled_scores,
    separated_best,
    weighted_scores,
)
from mmc_fast.errors import InputError


@pytest.fixture
def generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("metric", "truth"), [("auroc", roc_auc_score), ("auprc", average_precision_score)])
def test_ranked_scores_equal_scikit_learn_with_sample_weights(generator, metric, truth, ties):
    labels = np.r_[0, 1, generator.integers(0, 2, 60)]
    scores = labels * 0.7 + generator.normal(size=62)
    if ties:
        scores = np.round(scores)
    counts = resample_counts(62, 150, generator)  # more than are scored at a time
    got = weighted_scores(metric, labels, scores, counts)
    expected = [truth(labels, scores, sample_weight=row) for row in counts]
    np.testing.assert_allclose(got, expected, rtol=1e-12)


@pytest.mark.parametrize("metric", ["r2", "macro_auroc", "concordance"])
def test_scores_under_weights_are_those_of_the_repeated_rows(generator, metric):
    predicted = np.round(generator.normal(size=(40, 3)), 1)
    labels = (generator.random((40, 3)) < 0.4).astype(float)
    labels[:, 2] = 0
    labels[:2, :2] = [[0, 1], [1, 0]]
    if metric == "r2":
        labels = predicted + generator.normal(size=(40, 3)) + 1e6
    if metric == "concordance":
        predicted, labels[:, 0] = predicted[:, 0], generator.integers(9, size=40)
        labels = labels[:, :2]

    def truth(y, p):
        if metric == "r2":
            return r2_score(y, p, multioutput="uniform_average")
        if metric == "macro_auroc":  # a label that nobody has does not count
            return np.mean([roc_auc_score(y[:, j], p[:, j]) for j in range(2)])
        pairs = [
            (i, j) for i in range(len(y)) for j in range(len(y)) if y[i, 1] and (y[i, 0], 0) < (y[j, 0], 1 - y[j, 1])
        ]
        return np.mean([(p[i] > p[j]) + (p[i] == p[j]) / 2 for i, j in pairs])

    counts = resample_counts(40, 5, generator)
    counts[:, :2] += 1
    expected = [truth(np.repeat(labels, row, 0), np.repeat(predicted, row, 0)) for row in counts]
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(weighted_scores(metric, labels, predicted, counts), expected, rtol=1e-5)


def test_two_columns_mean_the_probability_of_class_one(generator):
    labels = np.array([0, 1, 1, 0, 1])
    p = generator.random(5)
    both = weighted_scores("auroc", labels, np.stack([1 - p, p], axis=1), np.ones((1, 5)))
    assert both[0] == weighted_scores("auroc", labels, p, np.ones((1, 5)))[0]


def test_accuracy_takes_classes_or_the_largest_column(generator):
    labels = generator.integers(0, 4, 50)
    logits = generator.normal(size=(50, 4))
    counts = resample_counts(50, 9, generator)
    expected = [accuracy_score(labels, logits.argmax(1), sample_weight=row) for row in counts]
    np.testing.assert_allclose(weighted_scores("accuracy", labels, logits, counts), expected, rtol=1e-12)
    np.testing.assert_allclose(weighted_scores("accuracy", labels, logits.argmax(1), counts), expected, rtol=1e-12)


def test_a_resample_without_one_class_is_undefined_not_wrong():
    labels = np.array([0, 1, 1])
    weights = np.array([[1, 1, 1], [0, 2, 1], [3, 0, 0]])
    assert np.isnan(weighted_scores("auroc", labels, [0.1, 0.2, 0.3], weights)).tolist() == [False, True, True]


def test_resample_counts_are_bootstrap_draws(generator):
    assert resample_counts(1, 2, generator).tolist() == [[1], [1]]
    counts = resample_counts(30, 4000, generator)
    assert (counts.sum(axis=1) == 30).all()
    assert abs(counts.mean() - 1) < 1e-12
    assert abs(counts.var() - (1 - 1 / 30)) < 0.05  # binomial(30, 1/30)


def test_mean_sd_uses_the_sample_variance():
    assert mean_sd([1.0, 2.0, 4.0]) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert mean_sd([0.5, 1.5]) == (1.0, pytest.approx(np.sqrt(0.5)))
    assert mean_sd([0.5]) == (0.5, None)


@pytest.mark.parametrize("noise", [0.0, 0.1, 2.0])
def test_interval_is_student_t_with_the_freedom_of_welch(generator, noise):
    seeds, resamples = int(generator.integers(2, 8)), 40
    plain = generator.normal(0.5, 1, size=seeds)
    scores = ResampledScores(plain, plain[:, None] + noise * generator.normal(size=(seeds, resamples)))
    scores.resampled[0, :2] = np.nan  # resamples without one of the classes
    samples = np.var([column.mean() for column in scores.resampled.T[2:]], ddof=1)
    variance = samples + stats.sem(plain) ** 2
    freedom = variance**2 / (stats.sem(plain) ** 4 / (seeds - 1))  # that of the samples' part is infinite
    truth = stats.t(freedom, loc=plain.mean(), scale=np.sqrt(variance))
    found = scores.interval(0.9)
    assert (found.low, found.high) == (pytest.approx(truth.ppf(0.05)), pytest.approx(truth.ppf(0.95)))
    assert found.p_zero == pytest.approx(2 * min(truth.cdf(0), truth.sf(0)))
    assert (found.se, found.sd_seeds) == (pytest.approx(np.sqrt(variance)), pytest.approx(stats.sem(plain)))
    assert [found.excludes(v) for v in (found.low, found.high, found.low - 1e-9, found.high + 1e-9)] == [0, 0, 1, 1]


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_without_spread_zero_is_either_certain_or_impossible(value):
    found = ResampledScores(np.full(3, value), np.full((3, 50), value)).interval()
    assert (found.low, found.high, found.p_zero) == (value, value, 1.0 - value)


def test_holm_is_the_closure_of_bonferroni(generator):
    """A hypothesis is rejected where every family that holds it is: the largest Bonferroni p-value over the subsets."""
    subsets = [s for n in range(1, 7) for s in itertools.combinations(range(6), n)]
    for p in (generator.random(6) ** 3, generator.random(6)):
        expected = [max(min(1, len(s) * min(p[list(s)])) for s in subsets if i in s) for i in range(6)]
        assert holm(p) == pytest.approx(expected)
    assert holm([]) == []


def test_interval_with_one_seed_is_the_bootstrap_of_the_test_set(generator):
    labels = generator.integers(0, 2, 400)
    predicted = np.where(generator.random(400) < 0.8, labels, 1 - labels)
    interval = resampled_scores("accuracy", labels, [predicted], resample_counts(400, 4000, generator)).interval()
    rate = (predicted == labels).mean()
    assert interval.sd_seeds is None
    assert interval.se == interval.sd_samples
    assert interval.sd_samples == pytest.approx(np.sqrt(rate * (1 - rate) / 400), rel=0.08)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * interval.sd_samples, rel=1e-3)


def test_paired_interval_covers_a_true_zero_as_often_as_it_says(generator):
    """Two methods of the same quality, noisy over three seeds and over samples that are hard for both."""
    held = 0
    for _ in range(200):
        labels = generator.integers(0, 2, 250)
        hard = generator.random(250) * 0.4
        runs = []
        for _method in range(2):
            quality = 0.95 + generator.normal(size=3) * 0.03
            runs.append([np.where(generator.random(250) < q - hard, labels, 1 - labels) for q in quality])
        counts = resample_counts(250, 150, generator)
        first, second = (resampled_scores("accuracy", labels, run, counts) for run in runs)
        held += not (first - second).interval().excludes(0)
    assert held / 200 > 0.87


def test_separated_best_needs_every_comparison(generator):
    labels = generator.integers(0, 2, 800)

    def method(quality: float) -> list[np.ndarray]:
        return [np.where(generator.random(800) < quality, labels, 1 - labels) for _ in range(3)]

    counts = resample_counts(800, 300, generator)
    good, also_good, bad = (resampled_scores("accuracy", labels, method(q), counts) for q in (0.95, 0.95, 0.6))
    assert separated_best({"good": good, "bad": bad}) == "good"
    assert separated_best({"bad": bad, "good": good, "twin": good}) is None
    assert separated_best({"good": good}) is None
    gap = abs((good - also_good).interval().estimate)
    if not (good - also_good).interval().excludes(0):
        assert separated_best({"a": good, "b": also_good, "c": bad}) is None, gap


def test_average_and_difference_keep_the_pairing(generator):
    parts = [ResampledScores(generator.random(2), generator.random((2, 7))) for _ in range(3)]
    difference = parts[0] - parts[1]
    np.testing.assert_array_equal(difference.plain, parts[0].plain - parts[1].plain)
    np.testing.assert_array_equal(difference.resampled, parts[0].resampled - parts[1].resampled)
    mean = average(parts)
    np.testing.assert_allclose(mean.plain, sum(p.plain for p in parts) / 3)
    np.testing.assert_allclose(mean.resampled, sum(p.resampled for p in parts) / 3)


@pytest.mark.parametrize(("groups", "finite"), [(2, 30), (3, 9), (3, 10), (3, 30), (20, 30)])
def test_interval_of_group_resamples(generator, groups, finite):
    """Student's t on the groups, with the spread that K groups would have if their variance were divided by K - 1."""
    draws = np.r_[generator.normal(5, 2, finite), np.full(4, np.nan)]
    found = interval(5.0, draws, groups, 0.9)
    if groups < 3 or finite < 10:
        assert (found.value, found.error, found.low, found.high) == (5.0, None, None, None)
        return
    error = np.nanstd(draws, ddof=1) * np.sqrt(groups / (groups - 1))
    ends = stats.t.interval(0.9, groups - 1, 5.0, error)
    assert (found.error, found.low, found.high) == pytest.approx((error, *ends))
    cut = interval(5.0, draws, groups, 0.9, (4.999, 5.001))
    assert (cut.error, cut.low, cut.high) == (found.error, 4.999, 5.001)


def test_shares_of_more_modalities_than_all_coalitions_are_scored_for(generator):
    """Where contributions add up, first and last equal the Shapley value; where pairs interact, half of it goes to each."""
    m, full = 8, 255
    worth = generator.normal(size=m)
    pair = 3.0  # of modalities 0 and 1 together

    def score(coalition: int) -> np.ndarray:
        own = [worth[i] for i in range(m) if coalition >> i & 1]
        return np.array([0.25 + sum(own) + pair * (coalition & 3 == 3)])

    scored = [0, full, *(1 << i for i in range(m)), *(full ^ 1 << i for i in range(m))]
    found = {f"{kind}.{c}": score(c) * sign for c in scored for kind, sign in (("coalition", 1), ("resampled", -1))}
    names = [f"m{i}" for i in range(m)]
    effects = {f"shuffled.{i}": np.array([float(i)]) for i in range(m)}
    for i in range(m):
        found[f"shuffled.{i}"] = np.array([10.0 + i])
    got = reliance_measures(names, found, np.array([0.25]), effects)
    for i, name in enumerate(names):
        share = worth[i] + (pair / 2 if i < 2 else 0.0)
        assert got[f"shapley.{name}"] == pytest.approx(share)
        assert got[f"resampled_shapley.{name}"] == pytest.approx(-share)
        assert got[f"only.{name}"] == pytest.approx(score(1 << i))
        assert got[f"without.{name}"] == pytest.approx(score(full ^ 1 << i))
        assert (got[f"shuffled.{name}"].item(), got[f"total_effect.{name}"].item()) == (10 + i, i)
        assert f"alone.{name}" not in got
    assert (got["score.all"].item(), got["score.none"].item()) == (score(full).item(), 0.25)


def test_a_number_that_some_resamples_lack_is_nan_there():
    found = resampled(
        lambda w: {"always": w[0]} | ({"at times": w[1]} if w[1] else {}), np.array([[1.0, 0.0], [2.0, 3.0]])
    )
    np.testing.assert_array_equal(found["always"], [1, 2])
    np.testing.assert_array_equal(found["at times"], [np.nan, 3])


def test_interval_of_what_is_no_number_or_was_not_drawn(generator):
    assert interval(np.nan, generator.normal(size=30), 9, 0.95).value is None
    assert interval(1.0, None, 9, 0.95).error is None
    asked = ((500, 256), (500, 257), (20, 257), (500, 1024), (500, 1025))
    assert [affordable(r, [4, width]) for r, width in asked] == [500, 24, 20, 24, 0]


@pytest.mark.parametrize(
    "call",
    [
        lambda: mean_sd([]),
        lambda: weighted_scores("f1", [0, 1], [0, 1], [[1, 1]]),
        lambda: weighted_scores("auroc", [0, 1, 2], [0, 1, 2], [[1, 1, 1]]),
        lambda: weighted_scores("auroc", [0, 1], np.ones((2, 3)), [[1, 1]]),
        lambda: weighted_scores("accuracy", [0, 1], [0, 1, 1], [[1, 1]]),
        lambda: resample_counts(0, 10, np.random.default_rng(0)),
        lambda: resample_counts(10, 1, np.random.default_rng(0)),
        lambda: resampled_scores("auroc", [1, 1], [[0.1, 0.2]], np.ones((2, 2), dtype=int)),
        lambda: resampled_scores("r2", [[0], [1]], [[[0], [1]], [[0], [np.nan]]], np.ones((2, 2), dtype=int)),
        lambda: resampled_scores("auroc", [0, 1], [], np.ones((2, 2), dtype=int)),
        lambda: ResampledScores(np.ones(2), np.ones((2, 3))) - ResampledScores(np.ones(3), np.ones((3, 3))),
        lambda: ResampledScores(np.ones(2), np.ones((2, 3))).interval(level=1),
        lambda: ResampledScores(np.ones(2), np.ones((2, 3))).interval(level=0),
        lambda: average([]),
    ],
)
def test_bad_input_is_one_clear_line(call):
    with pytest.raises(InputError) as caught:
        call()
    assert "\n" not in str(caught.value)
