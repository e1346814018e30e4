"""Experiments that look inside trained models: their trainings on one data source, measurements on them, one per seed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

import numpy as np

from mmc_fast.diagnose.figures import Line
from mmc_fast.diagnose.statistics import ResampledScores, resample_counts, weighted_scores
from mmc_fast.errors import InputError

from ..compare.rows import Row, Source, load_rows, load_source, load_sources
from ..methods.base import merged
from ..training import load_run
from ..training.parts import fingerprint
from .base import Direction, Estimate, Outcome, Plan, Value, paired
from .pieces import Measured, Measurement, Training, finish, measured
from .representation import strength_order
from .scores import machine_facts

__all__ = [
    "METHODS", "Bench", "Series", "by_source", "curve", "described", "direction", "estimate", "resampled", "value",
]  # fmt: skip

METHODS = ("vanilla", "kd", "ebr-paper", "ebr-robust")
_CHANGES: dict[str, Any] = {"rates": [], "keep_checkpoints": 1}
_RESAMPLES = 400

Key = TypeVar("Key", bound=Hashable)
Selection = Literal["complete", "last"]
Series = Sequence[float | None]
"""One number per seed; None where the training diverged or there is no such number."""


class Bench:
    """One data source under a plan.

    Rows take the settings that ``compare`` stored for them on these data, else their first candidate. ``selection``: which
    epoch is looked at, "complete" (best on complete validation data) or "last". Raises InputError for rows that the
    standard loop does not train.
    """

    def __init__(
        self, plan: Plan, source: Source, rows: Sequence[str] = METHODS, selection: Selection = "complete"
    ) -> None:
        self.plan, self.source, self.selection = plan, source, selection
        self.rows = {row.name: row for row in load_rows(list(dict.fromkeys(("vanilla", *rows))))}
        self.fingerprint = fingerprint(load_source(source.key))
        self.metric = load_source(source.key).metric
        self.modalities = load_source(source.key).modalities
        if len(self.modalities) < 2:
            raise InputError(f"reproduce: {source.name} has one modality; give data with two or more")
        self._kept: dict[str, Measurement] = {}

    def training(
        self, row: str, seed: int, changes: Mapping[str, Any] | None = None, modalities: Sequence[str] | None = None
    ) -> Training:
        """A training of a row with ``changes`` of its settings, on some of the modalities."""
        plain = self.rows[row]
        source = self.source
        if modalities is not None:
            wanted = [name for name in self.modalities if name in modalities]
            source = replace(source, options={**source.options, "modalities": wanted})
        epochs = {} if self.plan.epochs is None else {"epochs": self.plan.epochs}
        budget = source.budget_with(_CHANGES | {"selection": self.selection} | epochs)
        # Unimodal models of the vanilla run say how strong a modality is, and what its own encoder makes of it.
        own = {"unimodal_share": 1.0} if row == "vanilla" else {}
        settings = merged(self._chosen(plain), own, {"checkpoint_every": budget.epochs}, changes or {})
        config, options = plain.resolve(settings, budget)
        if options:
            raise InputError(f"reproduce: row {row} has options of its own; measurements need the standard loop")
        return Training(row, source.name, source.key, self.fingerprint, seed, config.to_dict())

    def _chosen(self, row: Row) -> Mapping[str, Any]:
        return row.chosen.get(self.source.name, row.plugin.search[0])

    def finish(self, trainings: Sequence[Training]) -> None:
        """Train what is not trained yet."""
        finish(trainings, self.plan.grid, jobs=self.plan.jobs, on_event=self.plan.on_event)

    def strengths(self) -> dict[str, float]:
        """Modality -> mean validation score of its unimodal models over the seeds, strongest first."""
        trainings = [self.training("vanilla", seed) for seed in self.plan.seeds]
        self.finish(trainings)
        whole = [t for t in trainings if t.diverged(self.plan.grid) is None]
        if not whole:
            raise InputError(
                f"reproduce: vanilla diverged on {self.source.name} with every seed; set a smaller lr in the "
                "budget of the data (a TOML file for --data)"
            )
        return strength_order([load_run(self.plan.grid / t.run) for t in whole])

    def measure(self, measurements: Mapping[Key, Measurement]) -> dict[Key, Measured]:
        """Finish the measurements, and before them the trainings that they need."""
        folder = self.plan.grid
        left = [m for m in measurements.values() if not (folder / m.path).is_file()]
        self.finish([training for m in left for training in m.trainings.values()])
        finish(left, folder, jobs=self.plan.jobs, on_event=self.plan.on_event)
        self._kept |= {m.path: m for m in measurements.values()}
        return {key: measured(m, folder) for key, m in measurements.items()}

    def titles(self, rows: Sequence[str] = METHODS) -> dict[str, str]:
        """Row -> its name in tables."""
        return {name: self.rows[name].title for name in rows}

    def record(self) -> list[dict[str, Any]]:
        """Every measurement with its trainings and their settings, plain JSON values."""
        trainings = {t.run: t for m in self._kept.values() for t in m.trainings.values()}
        result: list[dict[str, Any]] = [{"training": path, "config": dict(t.config)} for path, t in trainings.items()]
        for path, m in self._kept.items():
            used = {name: t.run for name, t in m.trainings.items()}
            result.append({"measurement": path, "options": dict(m.options), "trainings": used})
        return result

    def facts(self) -> dict[str, str]:
        """Machine, budget, seeds."""
        config = self.training("vanilla", self.plan.seeds[0]).config
        return {
            **machine_facts(),
            "seeds": ", ".join(map(str, self.plan.seeds)),
            f"budget on {self.source.name}": f"{config['epochs']} epochs, batch {config['batch_size']}",
        }

    def notes(self, found: Mapping[Any, Measured]) -> list[str]:
        """A sentence for each reason why measurements are lacking."""
        reasons = sorted({m.diverged for m in found.values() if m.diverged is not None})
        return [f"On {self.source.name} a training diverged and is left out: {reason}" for reason in reasons]


def by_source(
    plan: Plan,
    names: Sequence[str],
    one: Callable[[Bench], Outcome],
    *,
    rows: Sequence[str] = METHODS,
    selection: Selection = "complete",
    notes: Sequence[str] = (),
) -> Outcome:
    """What ``one`` finds on each data source, put together; names of drawings get the source in front."""
    whole = Outcome([], [])
    for source in load_sources(list(names)):
        bench = Bench(plan, source, rows, selection)
        found = one(bench)
        whole = Outcome(
            [*whole.tables, *found.tables],
            [*whole.directions, *found.directions],
            {**whole.drawings, **{f"{source.name}-{name}": d for name, d in found.drawings.items()}},
            [*whole.notes, *found.notes],
            {**whole.facts, **bench.facts(), **found.facts},
            {**whole.record, source.name: {**found.record, "pieces": bench.record()}},
        )
    return replace(whole, notes=[*whole.notes, *notes])


def value(series: Series, paper: float | None = None) -> Value:
    """Mean ± s.d. over the seeds that have a number."""
    known = [x for x in series if x is not None]
    return Value.over(known, paper) if known else Value(paper=paper)


def direction(
    claim: str, paper: float, first: Series, second: Series | None = None, *, printed: bool = True
) -> Direction:
    """``first − second``, or the sign of ``first`` itself, paired by seed over the seeds that have both."""
    other: Series = [0.0] * len(first) if second is None else second
    pairs = [(a, b) for a, b in zip(first, other, strict=True) if a is not None and b is not None]
    ours = paired([a for a, _ in pairs], [b for _, b in pairs]) if pairs else None
    return Direction(claim, paper, ours, printed=printed)


def curve(values: Mapping[float, Value]) -> Line:
    """A line through the values that were measured; its band is the s.d. over the seeds."""
    known = [(x, v.mean, v.sd) for x, v in values.items() if v.mean is not None]
    return Line([x for x, _, _ in known], [y for _, y, _ in known], [sd for _, _, sd in known])


def described(curves: Mapping[str, Line]) -> str:
    """The values of each line in words, for the text beside a drawing."""
    return "; ".join(f"{name}: {', '.join(f'{y:.3g}' for y in line.y)}" for name, line in curves.items())


def resampled(metric: str, found: Sequence[Measured], name: str) -> ResampledScores | None:
    """Test scores of the probabilities ``name`` of each seed, on the test rows and on bootstrap resamples of them.

    The resamples depend on the number of rows alone, so that differences are paired. None where nothing was measured.
    """
    whole = [m for m in found if m.diverged is None]
    if len(whole) < len(found) or not whole:
        return None
    labels = whole[0].arrays["labels"]
    counts = resample_counts(len(labels), _RESAMPLES, np.random.default_rng(0))
    weights = np.concatenate([np.ones((1, len(labels))), counts])
    scores = np.stack([weighted_scores(metric, labels, m.arrays[name], weights) for m in whole])
    return ResampledScores(scores[:, 0], scores[:, 1:])


def estimate(scores: ResampledScores | None) -> Estimate | None:
    """Interval over seeds and test samples; with one seed it has no ends, since nothing is known of other trainings."""
    if scores is None:
        return None
    if len(scores.plain) == 1:
        return Estimate(float(scores.plain[0]), -np.inf, np.inf)
    return Estimate.of(scores.interval())
