"""From finished runs to findings: intervals, the threshold for re-implementations, paired tests against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from mmc_fast._util.toml import merged
from mmc_fast.diagnose.statistics import holm
from mmc_fast.errors import InputError

from ..jobs import Result
from ..report.comparison import AVERAGE, COMPLETE, Comparison, Score, compare
from .configs import MethodConfig
from .grid import Finished, Run
from .runs import mean_missing

UNDER_PERFORMING = "under-performing re-implementation"
_BASE = "vanilla"  # the method that the threshold compares with


@dataclass(frozen=True)
class MethodFacts:
    """What stands beside the numbers of a method config.

    ``threshold``: whether a re-implemented baseline holds vanilla's score on complete data within one standard error: "passed",
    :data:`UNDER_PERFORMING`, "not judged"; "" for other methods. ``diverged``: seeds without scores; such a method has no
    numbers. ``batch_rows``: rows that are predicted together where the prediction depends on them. ``seconds``: mean time of
    a run. ``without_effect``: seeds whose λ changed nothing.
    """

    name: str
    title: str
    method: str
    source: str
    settings: Mapping[str, Any]
    threshold: str
    diverged: tuple[int, ...]
    batch_rows: int | None
    seconds: float
    without_effect: tuple[int, ...] = ()

    @property
    def marked(self) -> str:
        """The title with a mark for each note."""
        return " ".join([self.title, "".join(self.notes)]).strip()

    @property
    def notes(self) -> dict[str, str]:
        """Mark -> what has to be known before the numbers are read."""
        notes = {"†": self.threshold} if self.threshold in (UNDER_PERFORMING, "not judged") else {}
        notes |= {"‡": f"batch of {self.batch_rows}"} if self.batch_rows else {}
        notes |= {"§": f"diverged with {len(self.diverged)} seed(s)"} if self.diverged else {}
        silent = len(self.without_effect)
        return notes | ({"¶": f"adversary without effect with {silent} seed(s)"} if silent else {})


@dataclass(frozen=True)
class Paired:
    """A method against the reference: paired by seed (``pairs`` of them), masks and test samples.

    ``p``: of the difference's t statistic, whose variance is that over seeds plus the bootstrap's over test samples;
    ``p_holm``: adjusted over all tests of the report (``family``). ``p_wilcoxon``: signed ranks of the seeds alone, which
    cannot be below ``2 / 2**pairs``; None where all differences are 0. With one seed there is no test: all three are None.
    """

    data: str
    metric: str
    condition: str
    method: str
    reference: str
    pairs: int
    difference: float
    low: float
    high: float
    p: float | None
    p_holm: float | None
    p_wilcoxon: float | None
    family: int


@dataclass(frozen=True)
class Findings:
    """One data set: a comparison for each metric (the first is the main one), facts by method, tests against the reference."""

    data: str
    comparisons: Mapping[str, Comparison]
    methods: Mapping[str, MethodFacts]
    tests: Sequence[Paired]
    realised: Mapping[str, Sequence[float]]

    @property
    def main(self) -> Comparison:
        return next(iter(self.comparisons.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "data": self.data,
            "comparisons": {metric: c.to_dict() for metric, c in self.comparisons.items()},
            "methods": {name: asdict(facts) for name, facts in self.methods.items()},
            "tests": [asdict(test) for test in self.tests],
            "realised": {k: list(v) for k, v in self.realised.items()},
        }


def find(
    finished: Finished, methods: Sequence[MethodConfig], *, reference: str | None = None, resamples: int = 1000
) -> list[Findings]:
    """Compare the methods on every data set. ``reference``: of the tests; None is vanilla, else the first method."""
    names = [m.name for m in methods]
    if reference is not None and reference not in names:
        raise InputError(f"compare: the reference {reference!r} is none of the methods {', '.join(names)}")
    base = reference or next((m.name for m in methods if m.method == _BASE), names[0])
    data_names = list(dict.fromkeys(run.data for run in finished.runs))
    found = [_one(data, finished, methods, base, resamples) for data in data_names]
    raw = [test.p for f in found for test in f.tests if test.p is not None]
    adjusted = iter(holm(raw))

    def with_family(test: Paired) -> Paired:
        return replace(test, p_holm=None if test.p is None else next(adjusted), family=len(raw))

    return [replace(f, tests=[with_family(test) for test in f.tests]) for f in found]


def _one(data: str, finished: Finished, methods: Sequence[MethodConfig], base: str, resamples: int) -> Findings:
    runs = {m.name: [run for run in finished.runs if (run.method, run.data) == (m.name, data)] for m in methods}
    whole = {
        name: [r.result for r in some] for name, some in runs.items() if not any(r.result.failed for r in some)
    }  # fmt: skip
    if not whole:
        raise InputError(
            f"compare: every method diverged on {data}; give method configs with a smaller lr (TOML files)"
        )
    first = next(iter(whole.values()))[0]
    seeds = [run.seed for run in next(iter(runs.values()))]
    metrics = [first.values["metric"]] + (["auprc"] if first.values["metric"] == "auroc" else [])
    predictions = {name: [_by_rate(r.arrays) for r in results] for name, results in whole.items()}
    comparisons = {
        metric: compare(
            data, metric, first.arrays["labels"], predictions,
            seeds=seeds, resamples=resamples, generator=np.random.default_rng(0),
        )
        for metric in metrics
    }  # fmt: skip
    scores = comparisons[metrics[0]].scores
    vanilla = next((m.name for m in methods if m.method == _BASE and m.name in whole), None)
    bound = None if vanilla is None else scores[vanilla][COMPLETE]
    facts = {m.name: _facts(m, runs[m.name], finished, scores.get(m.name), bound) for m in methods}
    tests = [t for m, c in comparisons.items() if base in whole for t in _tests(m, c, whole, base)]
    return Findings(data, comparisons, facts, tests, first.values["realised"])


def _facts(
    method: MethodConfig, runs: Sequence[Run], finished: Finished, scores: Any, bound: Score | None
) -> MethodFacts:  # fmt: skip
    threshold = ""
    if method.plugin.baseline:
        threshold = "not judged"
        if scores is not None and bound is not None:
            threshold = "passed" if scores[COMPLETE].mean >= bound.mean - bound.se else UNDER_PERFORMING
    return MethodFacts(
        method.name,
        method.title,
        method.method,
        method.plugin.source,
        merged(finished.selected[method.name, runs[0].data], method.settings),
        threshold,
        tuple(run.seed for run in runs if run.result.failed),
        next((run.result.values["batch_rows"] for run in runs if not run.result.failed), None),
        sum(run.result.seconds for run in runs) / len(runs),
        tuple(run.seed for run in runs if run.result.values.get("without_effect")),
    )


def _tests(metric: str, comparison: Comparison, whole: Mapping[str, Sequence[Result]], base: str) -> list[Paired]:
    key = "auprc" if metric == "auprc" else "score"
    tests = []
    for condition in (c for c in (COMPLETE, AVERAGE) if c in comparison.conditions):
        for name in (n for n in whole if n != base):
            d = comparison.difference(name, base, condition)
            by_seed = [[_score(r.values["scores"], condition, key) for r in whole[which]] for which in (name, base)]
            ahead = np.subtract(by_seed[0], by_seed[1])
            ranks = float(wilcoxon(ahead).pvalue) if d.p is not None and np.any(ahead != 0) else None
            what = comparison.dataset, metric, condition, name, base, len(ahead)
            tests.append(Paired(*what, d.estimate, d.low, d.high, d.p, d.p, ranks, 0))
    return tests


def _score(scores: Mapping[str, Mapping[str, float]], condition: str, key: str) -> float:
    found = scores["complete"][key] if condition == COMPLETE else mean_missing(scores, key)
    if found is None:
        raise InputError("compare: a run has no missing rates")
    return found


def _by_rate(arrays: Mapping[str, np.ndarray]) -> dict[float, np.ndarray]:
    rates = {float(n.removeprefix("missing_")): p for n, p in arrays.items() if n.startswith("missing_")}
    return {0.0: arrays["complete"]} | dict(sorted(rates.items()))
