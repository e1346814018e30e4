"""Finished runs on one data set, grouped by method and ordered by seed, as every section needs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmc_fast.diagnose.statistics import mean_sd
from mmc_fast.errors import InputError

__all__ = ["RunSet", "display_name", "group_runs", "method_of", "series_index"]

Results = Mapping[str, Any]

NAMES = {"vanilla": "vanilla", "dropout": "modality dropout", "kd": "KD", "ebr": "EBR", "robust": "EBR robust"}


def display_name(method: str) -> str:
    """How a method is called in tables and drawings."""
    return NAMES.get(method, method)


def method_of(run: Results) -> str:
    """The preset of a run where it has one, else its method."""
    return run.get("preset", run["method"])


def series_index(methods: Sequence[str]) -> dict[str, int]:
    """A colour index for every method that stays the same from drawing to drawing, keyed by display name."""
    fixed = list(NAMES)
    others = [m for m in methods if m not in NAMES]
    return {display_name(m): fixed.index(m) if m in NAMES else len(fixed) + others.index(m) for m in methods}


@dataclass(frozen=True)
class RunSet:
    """``methods``: method -> results of its runs, in order of the seed; every method has the same seeds."""

    dataset: str
    metric: str
    methods: Mapping[str, Sequence[Results]]
    title: str = ""

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in next(iter(self.methods.values()))]

    @property
    def first(self) -> Results:
        """The first method's run with the first seed."""
        return next(iter(self.methods.values()))[0]

    def name(self, method: str) -> str:
        """Display name; a method whose runs include inactive ones says so, and how many."""
        runs = self.methods[method]
        inactive = sum(run["label"] == "inactive" for run in runs)
        if not inactive:
            return display_name(method)
        return f"{display_name(method)} (inactive{'' if inactive == len(runs) else f' in {inactive} of {len(runs)}'})"

    def complete(self, method: str) -> float:
        """Mean score on complete test data."""
        return mean_sd([run["scores"]["complete"] for run in self.methods[method]])[0]

    def reliance(self, method: str) -> dict[str, dict[str, float]]:
        """Per modality, the means over seeds of "alone", "without", "only", "shuffled" and "shapley"."""
        runs = self.methods[method]
        first = runs[0]["scores"]["reliance"]
        return {
            modality: {
                kind: mean_sd([run["scores"]["reliance"][modality][kind] for run in runs])[0]
                for kind, value in entry.items()
                if isinstance(value, int | float)
            }
            for modality, entry in first.items()
        }

    def history(self, method: str, key: str) -> tuple[list[int], list[float], list[float | None]]:
        """Epochs, mean and s.d. over seeds of a logged quantity, for the epochs that logged it in every seed."""
        by_seed = [
            {record["epoch"]: record[key] for record in run["history"] if record.get(key) is not None}
            for run in self.methods[method]
        ]
        epochs = sorted(set.intersection(*(set(values) for values in by_seed)))
        stats = [mean_sd([values[epoch] for values in by_seed]) for epoch in epochs]
        return epochs, [mean for mean, _ in stats], [sd for _, sd in stats]


def group_runs(runs: Iterable[Results], titles: Mapping[str, str] | None = None) -> list[RunSet]:
    """Group runs by data set and method, in order of appearance; ``titles`` say what a data set is.

    Raises ``InputError`` where the seeds of the methods differ, so that runs do not pair up.
    """
    grouped: dict[str, dict[str, list[Results]]] = {}
    for run in runs:
        grouped.setdefault(run["data"]["name"], {}).setdefault(method_of(run), []).append(run)
    if not grouped:
        raise InputError("no finished runs to report")
    sets = []
    for dataset, methods in grouped.items():
        ordered = {method: sorted(group, key=lambda run: run["seed"]) for method, group in methods.items()}
        seeds = {method: [run["seed"] for run in group] for method, group in ordered.items()}
        if len({tuple(s) for s in seeds.values()}) > 1:
            raise InputError(f"{dataset}: the methods were run with different seeds, {seeds}; pairs need the same ones")
        metric = next(iter(ordered.values()))[0]["data"]["metric"]
        sets.append(RunSet(dataset, metric, ordered, (titles or {}).get(dataset, "")))
    return sets
