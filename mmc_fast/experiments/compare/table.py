"""From finished cells to tables: intervals, the gate for re-implementations, paired tests against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import wilcoxon

from mmc_fast.diagnose.statistics import holm
from mmc_fast.errors import InputError

from ..report.comparison import AVERAGE, COMPLETE, Comparison, Score, compare
from .cells import Cell, mean_missing, read_cell
from .rows import Row

__all__ = ["GATE", "Findings", "Paired", "RowFacts", "find"]

GATE = "under-performing re-implementation"
_BASE = "vanilla"  # the plug-in that the gate compares with


@dataclass(frozen=True)
class RowFacts:
    """What stands beside the numbers of a row. ``gate``: "passed", :data:`GATE`, "not judged", or "" for no peer.

    ``diverged``: seeds without scores; such a row has no numbers. ``batch_rows``: rows that are predicted together where
    the prediction depends on them. ``seconds``: mean time of a cell.
    """

    row: str
    title: str
    method: str
    source: str
    settings: Mapping[str, Any]
    gate: str
    diverged: tuple[int, ...]
    batch_rows: int | None
    seconds: float

    @property
    def label(self) -> str:
        return self.title + (f" ({'; '.join(self.notes.values())})" if self.notes else "")

    @property
    def marked(self) -> str:
        """The title with a mark for each note."""
        return " ".join([self.title, "".join(self.notes)]).strip()

    @property
    def notes(self) -> dict[str, str]:
        """Mark -> what has to be known before the numbers are read."""
        notes = {"†": self.gate} if self.gate in (GATE, "not judged") else {}
        notes |= {"‡": f"batch of {self.batch_rows}"} if self.batch_rows else {}
        return notes | ({"§": f"diverged with {len(self.diverged)} seed(s)"} if self.diverged else {})


@dataclass(frozen=True)
class Paired:
    """A row against the reference: paired by seed (``pairs`` of them), masks and test samples.

    ``p``: of the difference's t statistic, whose variance is that over seeds plus the bootstrap's over test samples;
    ``p_holm``: adjusted over all tests of the report (``family``). ``p_wilcoxon``: signed ranks of the seeds alone, which
    cannot be below ``2 / 2**pairs``; None where all differences are 0.
    """

    data: str
    metric: str
    condition: str
    row: str
    reference: str
    pairs: int
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    p_wilcoxon: float | None
    family: int


@dataclass(frozen=True)
class Findings:
    """One data set: a comparison for each metric (the first is the main one), facts by row, tests against the reference."""

    data: str
    comparisons: Mapping[str, Comparison]
    rows: Mapping[str, RowFacts]
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
            "rows": {name: asdict(facts) for name, facts in self.rows.items()},
            "tests": [asdict(test) for test in self.tests],
            "realised": {k: list(v) for k, v in self.realised.items()},
        }


def find(
    cells: Sequence[Cell],
    folder: Path,
    rows: Sequence[Row],
    settings: Mapping[tuple[str, str], Mapping[str, Any]],
    *,
    reference: str | None = None,
    resamples: int = 1000,
) -> list[Findings]:
    """Compare the rows on every data set. ``reference``: the row of the tests; None is vanilla, else the first row."""
    names = [row.name for row in rows]
    if reference is not None and reference not in names:
        raise InputError(f"compare: the reference {reference!r} is none of the rows {', '.join(names)}")
    base = reference or next((row.name for row in rows if row.method == _BASE), names[0])
    by_data: dict[str, dict[str, list[tuple[dict[str, Any], dict[str, Any]]]]] = {}
    for cell in cells:
        by_data.setdefault(cell.data, {}).setdefault(cell.row, []).append(read_cell(folder / cell.path))
    found = [_one(data, by_row, rows, settings, base, resamples) for data, by_row in by_data.items()]
    raw = [test for f in found for test in f.tests]
    adjusted = iter(holm([test.p for test in raw]))
    return [
        Findings(
            f.data,
            f.comparisons,
            f.rows,
            [Paired(**asdict(t) | {"p_holm": next(adjusted), "family": len(raw)}) for t in f.tests],
            f.realised,
        )
        for f in found
    ]


def _one(
    data: str,
    by_row: Mapping[str, Sequence[tuple[dict[str, Any], dict[str, Any]]]],
    rows: Sequence[Row],
    settings: Mapping[tuple[str, str], Mapping[str, Any]],
    base: str,
    resamples: int,
) -> Findings:
    whole = {name: cells for name, cells in by_row.items() if not any(meta["diverged"] for meta, _ in cells)}
    if not whole:
        raise InputError(f"compare: every row diverged on {data}; lower the learning rate")
    first_meta, first = next(iter(whole.values()))[0]
    seeds = [meta["cell"]["seed"] for meta, _ in next(iter(whole.values()))]
    metrics = [first_meta["metric"]] + (["auprc"] if first_meta["metric"] == "auroc" else [])
    predictions = {name: [_by_rate(arrays) for _, arrays in cells] for name, cells in whole.items()}
    comparisons = {
        metric: compare(
            data,
            metric,
            first["labels"],
            predictions,
            seeds=seeds,
            resamples=resamples,
            generator=np.random.default_rng(0),
        )
        for metric in metrics
    }
    main = comparisons[metrics[0]]
    vanilla = next((row.name for row in rows if row.method == _BASE and row.name in whole), None)
    floor = None if vanilla is None else main.scores[vanilla][COMPLETE]
    facts = {
        row.name: _facts(row, by_row[row.name], settings[row.name, data], main.scores.get(row.name), floor)
        for row in rows
    }
    tests = [t for m, c in comparisons.items() if base in whole for t in _tests(data, m, c, whole, base)]
    return Findings(data, comparisons, facts, tests, first_meta["realised"])


def _facts(
    row: Row, cells: Sequence[tuple[dict[str, Any], Any]], settings: Any, scores: Any, floor: Score | None
) -> RowFacts:
    metas = [meta for meta, _ in cells]
    gate = ""
    if row.plugin.baseline:
        gate = "not judged"
        if scores is not None and floor is not None and floor.se is not None:
            gate = "passed" if scores[COMPLETE].mean >= floor.mean - floor.se else GATE
    return RowFacts(
        row.name,
        row.title,
        row.method,
        row.plugin.source,
        {**settings, **row.settings},
        gate,
        tuple(meta["cell"]["seed"] for meta in metas if meta["diverged"]),
        metas[0]["batch_rows"],
        sum(meta["seconds"] for meta in metas) / len(metas),
    )


def _tests(data: str, metric: str, comparison: Comparison, whole: Mapping[str, Any], base: str) -> list[Paired]:
    key = "auprc" if metric == "auprc" else "score"
    tests = []
    for condition in (c for c in (COMPLETE, AVERAGE) if c in comparison.conditions):
        for name in (n for n in whole if n != base):
            d = comparison.difference(name, base, condition)
            by_seed = [[_score(meta["scores"], condition, key) for meta, _ in whole[which]] for which in (name, base)]
            p = 1.0 if d.p is None else d.p
            tests.append(
                Paired(data, metric, condition, name, base, len(by_seed[0]), d.estimate, d.low, d.high, p, p,
                     _signed_ranks(by_seed), 1)
            )  # fmt: skip
    return tests


def _score(scores: Mapping[str, Mapping[str, float]], condition: str, key: str) -> float:
    found = scores["complete"][key] if condition == COMPLETE else mean_missing(scores, key)
    if found is None:
        raise InputError("compare: a cell has no missing rates")
    return found


def _signed_ranks(by_seed: Sequence[Sequence[float]]) -> float | None:
    differences = np.subtract(by_seed[0], by_seed[1])
    return float(wilcoxon(differences).pvalue) if np.any(differences != 0) else None


def _by_rate(arrays: Mapping[str, np.ndarray]) -> dict[float, np.ndarray]:
    rates = {float(n.removeprefix("missing_")): p for n, p in arrays.items() if n.startswith("missing_")}
    return {0.0: arrays["complete"]} | dict(sorted(rates.items()))
