"""Experiments that look inside trained models: their trainings on one data config, and measurements on them, one per seed."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.toml import merged
from mmc_fast.diagnose.adapter import flat
from mmc_fast.diagnose.figures import Drawing, Line, bars, lines
from mmc_fast.diagnose.statistics import ResampledScores, resample_counts, weighted_scores
from mmc_fast.errors import InputError

from ..compare.configs import DataConfig, load_data, load_data_configs, load_method_configs
from ..compare.runs import settings_of, train_and_keep
from ..data import MultimodalDataset, Part
from ..jobs import Job, Result, Values, Workspace, finish
from ..training import LoadedRun, MultimodalModel, UnimodalModels, load_run
from ..training.adapter import RunAdapter
from .base import Direction, Estimate, Outcome, Plan, Value, paired
from .scores import machine_facts

METHODS = ("vanilla", "kd", "ebr-paper", "ebr-robust")
_CHANGES: dict[str, Any] = {"rates": [], "keep_checkpoints": 1}
_RESAMPLES = 400

Selection = Literal["complete", "last"]
Series = Sequence[float | None]
"""One number per seed; None where the training diverged or there is no such number."""
Measure = Callable[[Mapping[str, Any], Workspace], tuple[Values, dict[str, np.ndarray]]]


class Models:
    """What a measuring function gets: finished trainings by name, their data, its options and seed."""

    def __init__(self, settings: Mapping[str, Any], workspace: Workspace) -> None:
        self._trainings, self._folder = settings["trainings"], workspace.folder
        self.options, self.seed = settings["options"], settings["seed"]

    def run(self, name: str) -> LoadedRun:
        """A finished training, from its folder."""
        return load_run(self._folder / self._trainings[name]["folder"])

    def data(self, name: str) -> MultimodalDataset:
        """The data that a training saw."""
        return load_data(self._trainings[name]["source"])


@dataclass(frozen=True)
class Found:
    """Finished measurements by (method config, variant, seed); ``failed``: why some of them are lacking."""

    results: Mapping[tuple[str, Hashable, int], Result]
    seeds: Sequence[int]

    def of(self, method: str, variant: Hashable = None) -> list[Result]:
        """The results of all seeds."""
        return [self.results[method, variant, seed] for seed in self.seeds]

    def series(self, method: str, name: str, variant: Hashable = None) -> Series:
        """One value of the results of all seeds."""
        return [result.values.get(name) for result in self.of(method, variant)]

    @property
    def failed(self) -> list[str]:
        return sorted({r.failed for r in self.results.values() if r.failed is not None})


class Bench:
    """One data config under a plan.

    Method configs take the hyper-parameters that are stored for these data, else their first candidate. ``selection``: which
    epoch is looked at, "complete" (best on complete validation data) or "last".
    """

    def __init__(
        self, plan: Plan, data: DataConfig, methods: Sequence[str] = METHODS, selection: Selection = "complete"
    ) -> None:
        self.plan, self.data, self.selection = plan, data, selection
        self.methods = {m.name: m for m in load_method_configs(list(dict.fromkeys(("vanilla", *methods))))}
        self.titles = {name: self.methods[name].title for name in methods}
        dataset = load_data(data.key)
        self.metric, self.modalities = dataset.metric, dataset.modalities
        if len(self.modalities) < 2:
            raise InputError(f"reproduce: {data.name} has one modality; give data with two or more")
        self.record: list[dict[str, Any]] = []

    def training(
        self, method: str, seed: int, changes: Mapping[str, Any] | None = None, modalities: Sequence[str] | None = None
    ) -> Job:
        """The training of a method config with ``changes`` of its settings, on some of the modalities."""
        config, data = self.methods[method], self.data
        if modalities is not None:
            wanted = [name for name in self.modalities if name in modalities]
            data = replace(data, options={**data.options, "modalities": wanted})
        budget = data.budget_with(_CHANGES | {"selection": self.selection} | self.plan.changes)
        # Unimodal models of the vanilla run say how strong a modality is, and what its own encoder makes of it.
        own = {"unimodal_share": 1.0} if method == "vanilla" else {}
        selected = config.selected.get(data.name, config.plugin.search[0])
        every = merged(selected, own, {"checkpoint_every": budget.epochs}, changes or {})
        settings, options = config.resolve(every, budget)
        if options:
            raise InputError(f"reproduce: {method} has options of its own; measurements need the standard loop")
        everything = settings_of(data, seed, settings, evaluate_on=[], unimodal=None)
        return Job(f"trained/{data.name}/{method}-{seed}", train_and_keep, everything, "trainings")

    def strengths(self) -> dict[str, float]:
        """Modality -> mean validation score of its unimodal models over the seeds, strongest first."""
        jobs = [self.training("vanilla", seed) for seed in self.plan.seeds]
        whole = [job for job, result in zip(jobs, self._finish(jobs), strict=True) if not result.failed]
        if not whole:
            raise InputError(
                f"reproduce: vanilla diverged on {self.data.name} with every seed; set a smaller lr in the "
                "budget of the data (a TOML file for --data)"
            )
        models = [load_run(self.plan.grid / job.own).unimodal for job in whole]
        scores = [m.scores for m in models if m is not None]
        mean = {name: sum(s[name] for s in scores) / len(scores) for name in scores[0]}
        return dict(sorted(mean.items(), key=lambda item: -item[1]))

    def measure(
        self,
        function: Measure,
        trainings: Callable[[str, Any, int], Mapping[str, Job]],
        *,
        methods: Sequence[str] = METHODS,
        variants: Sequence[Hashable] = (None,),
        options: Mapping[str, Any] | None = None,
    ) -> Found:
        """``function`` on the ``trainings(method, variant, seed)`` of every method, variant and seed, trained before."""
        keys = [(m, v, seed) for m in methods for v in variants for seed in self.plan.seeds]
        needed = {key: trainings(*key) for key in keys}
        jobs = list({job.path: job for some in needed.values() for job in some.values()}.values())
        failed = {job.path: r.failed for job, r in zip(jobs, self._finish(jobs), strict=True)}
        results: dict[tuple[str, Hashable, int], Result] = {}
        measured: dict[tuple[str, Hashable, int], Job] = {}
        for key, some in needed.items():
            reason = next((failed[job.path] for job in some.values() if failed[job.path]), None)
            if reason is not None:
                results[key] = Result({}, {}, {}, reason, 0.0, 1)
            else:
                measured[key] = self._measurement(function, key, some, options or {})
        results |= dict(zip(measured, self._finish(list(measured.values())), strict=True))
        self.record += [{"training": job.own, "config": job.settings["config"]} for job in jobs]
        self.record += [{"measurement": job.path, **job.settings} for job in measured.values()]
        return Found({key: results[key] for key in keys}, list(self.plan.seeds))

    def _measurement(
        self,
        function: Measure,
        key: tuple[str, Hashable, int],
        trainings: Mapping[str, Job],
        options: Mapping[str, Any],
    ) -> Job:
        used = {name: {"folder": job.own, "source": job.settings["source"]} for name, job in trainings.items()}
        settings = {"trainings": used, "options": dict(options), "seed": key[2]}
        where = f"measurements/{function.__module__.rpartition('.')[2]}/{self.data.name}/{key[0]}-{key[2]}"
        return Job(where, function, settings, "measurements")

    def _finish(self, jobs: Sequence[Job]) -> list[Result]:
        return finish(jobs, self.plan.grid, workers=self.plan.workers, on_event=self.plan.on_event)

    def notes(self, found: Found) -> list[str]:
        """A sentence for each reason why measurements are lacking."""
        return [f"On {self.data.name} a training diverged and is left out: {reason}" for reason in found.failed]

    def facts(self) -> dict[str, str]:
        """Machine, budget, seeds."""
        config = self.training("vanilla", self.plan.seeds[0]).settings["config"]
        return {
            **machine_facts(),
            "seeds": ", ".join(map(str, self.plan.seeds)),
            f"budget on {self.data.name}": f"{config['epochs']} epochs, batch {config['batch_size']}",
        }


def by_data(
    plan: Plan,
    one: Callable[[Bench], Outcome],
    *,
    methods: Sequence[str] = METHODS,
    selection: Selection = "complete",
    notes: Sequence[str] = (),
) -> Outcome:
    """What ``one`` finds on each data config, put together; names of drawings get the data's name in front."""
    whole = Outcome([], [])
    for data in load_data_configs(plan.data):
        bench = Bench(plan, data, methods, selection)
        found = one(bench)
        whole = Outcome(
            [*whole.tables, *found.tables],
            [*whole.directions, *found.directions],
            {**whole.drawings, **{f"{data.name}-{name}": d for name, d in found.drawings.items()}},
            [*whole.notes, *found.notes],
            {**whole.facts, **bench.facts(), **found.facts},
            {**whole.record, data.name: bench.record},
        )
    return replace(whole, notes=[*whole.notes, *notes])


# Numbers


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


def resampled(metric: str, found: Sequence[Result], name: str) -> ResampledScores | None:
    """Test scores of the probabilities ``name`` of each seed, on the test rows and on bootstrap resamples of them.

    The resamples depend on the number of rows alone, so that differences are paired. None where a seed is lacking.
    """
    if not found or any(r.failed for r in found):
        return None
    labels = found[0].arrays["labels"]
    counts = resample_counts(len(labels), _RESAMPLES, np.random.default_rng(0))
    weights = np.concatenate([np.ones((1, len(labels))), counts])
    scores = np.stack([weighted_scores(metric, labels, r.arrays[name], weights) for r in found])
    return ResampledScores(scores[:, 0], scores[:, 1:])


def estimate(scores: ResampledScores | None) -> Estimate | None:
    """Interval over seeds and test samples; with one seed it has no ends, since nothing is known of other trainings."""
    if scores is None:
        return None
    if len(scores.plain) == 1:
        return Estimate(float(scores.plain[0]), -np.inf, np.inf)
    return Estimate.of(scores.interval())


def number(x: float | None) -> float | None:
    """The value as JSON knows it: NaN and infinities are None."""
    return float(x) if x is not None and math.isfinite(x) else None


def curve(values: Mapping[float, Value]) -> Line:
    """A line through the values that were measured; its band is the s.d. over the seeds."""
    known = [(x, v.mean, v.sd) for x, v in values.items() if v.mean is not None]
    return Line([x for x, _, _ in known], [y for _, y, _ in known], [sd for _, _, sd in known])


def draw_curves(
    title: str, curves: Mapping[str, Line], x_label: str, y_label: str, about: str, *, markers: bool = True
) -> Drawing:
    """A drawing whose text says ``about`` and the values of each line, first and last where there are many."""
    ends = "; ".join(
        f"{name}: {', '.join(f'{y:.3g}' for y in (line.y if len(line.y) < 9 else (line.y[0], line.y[-1])))}"
        for name, line in curves.items()
    )
    alt, caption = f"{about} {ends}.", "Band: s.d. over seeds."
    return lines(title, curves, x_label=x_label, y_label=y_label, alt=alt, caption=caption, markers=markers)


def draw_bars(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[Value]], y_label: str, about: str, **options: Any
) -> Drawing:
    """Groups of bars, one for each name in ``series``, whose text says ``about`` and every height; whiskers are s.d."""
    heights = {name: [v.mean or 0.0 for v in values] for name, values in series.items()}
    ends = "; ".join(f"{name}: {', '.join(f'{h:.3f}' for h in some)}" for name, some in heights.items())
    errors = {name: [v.sd for v in values] for name, values in series.items()}
    alt, caption = f"{about} {ends}.", "Bars: mean over seeds, whiskers: s.d."
    return bars(title, groups, heights, y_label=y_label, alt=alt, caption=caption, errors=errors, **options)


# Representations


@torch.no_grad()
def fused(model: MultimodalModel, part: Part) -> Tensor:
    """Fused representation ``[N, r]``: what the last Linear layer of the fusion receives on these rows.

    Raises InputError for late fusion, which has none.
    """
    adapter = RunAdapter(model)
    received = adapter.encode(part)
    if adapter.head is not None:  # concatenation: the hidden layers of its chain
        return adapter.head[:-1](flat(received))  # type: ignore[index,operator]
    if not hasattr(model.fusion, "classifier"):
        raise InputError("late fusion has no fused representation; choose fusion 'concat' or 'transformer'")
    return adapter.represent(received)


@torch.no_grad()
def alone(unimodal: UnimodalModels | None, dataset: MultimodalDataset, part: Part, name: str) -> Tensor:
    """Features ``[N, p]`` of one modality by the encoder of its unimodal model; rows without it are zeros."""
    if unimodal is None:
        raise InputError("the run has no unimodal models; train it with unimodal_share above 0")
    column = dataset.modalities.index(name)
    here = part.present[:, column, None]
    return torch.where(here, unimodal.models[name].encoder(part.features[column]), 0.0)
