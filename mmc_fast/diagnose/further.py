"""Further measures of a diagnosis, from the kept rows and from single batches: information, refitted heads, EMAP, what is left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.extras import MissingExtra
from mmc_fast.errors import InputError

from .absence import Condition, Remover, conditions_of
from .adapter import Adapter, flat
from .collect import Collector
from .features import checked_features
from .groups import stream
from .layers import ChainSums
from .measures import information
from .measures.blocks import effective_rank, spectrum
from .measures.outputs import emap_outputs
from .measures.refitted import class_variance_share, conditional_utilisation
from .measures.similarity import covariance_of
from .options import DiagnoseOptions
from .result import Measure, around
from .sampled import features_of
from .subsets import SubsetRows
from .tasks import Task

COMPONENTS = 16
PARTNERS = 256
REPRESENTED_ROWS = 2048


def information_measures(
    measures: dict[str, Measure], arrays: dict[str, Any], notes: list[str], collector: Collector, level: float
) -> None:
    """Gaussian information about the class, of each modality and the rest, and the margin of distillation between them."""
    labels, names = collector.reservoir.columns["labels"], list(collector.widths)
    target = information.one_hot(labels)
    count = min(COMPONENTS, (len(labels) // 4 - target.shape[1]) // len(names))
    if len(names) < 2 or not target.shape[1]:
        return
    if count < 1:
        notes.append(f"{len(labels)} samples are too few for information of {len(names)} modalities and the classes.")
        return
    parts = {name: information.components(x, count) for name, x in features_of(collector).items()}
    for name in names:
        rest = torch.cat([x for other, x in parts.items() if other != name], 1)
        rest = information.components(rest, rest.shape[1])  # what modalities share would make it singular
        found = information.gaussian_pid(parts[name], rest, target)
        measures |= {
            f"pid.{kind}.{name}": _measure(getattr(found, kind), level, information.GROUPS - 1)
            for kind in ("redundancy", "unique", "unique_rest", "synergy")
        }
    margins = {}
    for student in names:
        margins[student] = {
            teacher: information.distillation_margin(parts[teacher], parts[student], target)
            for teacher in names if teacher != student
        }  # fmt: skip
        measures[f"distillation.{student}"] = _measure(
            max(margins[student].values(), key=lambda i: i.value), level, information.GROUPS - 1
        )
    arrays["distillation"] = {s: {t: i.value for t, i in of.items()} for s, of in margins.items()}
    arrays["information_components"] = {name: x.shape[1] for name, x in parts.items()}


def utilisation_measures(
    measures: dict[str, Measure], notes: list[str], collector: Collector, o: DiagnoseOptions
) -> None:
    """Conditional utilisation of the frozen features."""
    try:
        found = conditional_utilisation(features_of(collector), collector.reservoir.columns["labels"], seed=o.seed)
    except InputError as error:
        notes.append(f"No head was refitted: {error}.")
        return
    measures |= {f"utilisation.{name}": _measure(i, o.level, np.inf) for name, i in found.items()}


@torch.no_grad()
def emap_measures(
    measures: dict[str, Measure],
    adapter: Adapter,
    batches: Iterable[tuple[int, Any]],
    collector: Collector,
    task: Task,
    seed: int,
    level: float,
) -> int:
    """Scores with and without interactions of modalities on the first batch, and what they differ; returns its number of rows."""
    batch = next(iter(batches))[1]
    features = checked_features(adapter, batch, collector.widths, 0)
    labels = collector.labels(batch)
    assert labels is not None
    additive = emap_outputs(adapter.fuse, features, PARTNERS, stream(seed, "emap")).cpu()
    whole, places = adapter.fuse(features).double().cpu(), collector.places(0, len(labels))

    def gain(rows: Tensor) -> float:
        return task.evaluate(whole[rows], labels[rows]) - task.evaluate(additive[rows], labels[rows])

    measures["emap.all"] = _jackknife(lambda rows: task.evaluate(whole[rows], labels[rows]), places, level)
    measures["emap.score"] = _jackknife(lambda rows: task.evaluate(additive[rows], labels[rows]), places, level)
    measures["emap.interaction"] = _jackknife(gain, places, level)
    return len(labels)


@torch.no_grad()
def remaining_measures(
    measures: dict[str, Measure],
    adapter: Adapter,
    batches: Iterable[tuple[int, Any]],
    collector: Collector,
    seed: int,
    level: float,
) -> None:
    """Effective rank and η² of the fused representation without each modality (features of other samples), on the first rows."""
    represent = _representation(adapter, collector)
    names = list(collector.widths)
    remover = Remover(represent, collector.widths, collector.reservoir.columns, collector.groups)
    rows: dict[str, list[Tensor]] = {name: [] for name in ("", *names)}
    labels: list[Tensor] = []
    places: list[Tensor] = []
    seen = 0
    for index, batch in batches:
        features = checked_features(adapter, batch, collector.widths, index)
        count = len(next(iter(features.values())))
        numbers = torch.arange(seen, seen + count)
        places.append(collector.places(index, count))
        drawn = remover.drawn(numbers, places[-1], stream(seed, "remaining", index))
        seen += count
        for name in rows:
            condition = Condition(tuple(other != name for other in names), "resample")
            rows[name].append(remover.outputs(features, condition, drawn).flatten(1).cpu())
        found = collector.labels(batch)
        labels += [] if found is None else [found]
        if sum(map(len, rows[""])) >= REPRESENTED_ROWS:
            break
    groups, classes = torch.cat(places), collector.task is not None and collector.task.kind == "classes"
    y = torch.cat(labels) if labels and classes else None
    for name, parts in rows.items():
        x, shown = torch.cat(parts), name or "all"
        measures[f"remaining.rank.{shown}"] = _jackknife(partial(_rank, x), groups, level)
        if y is not None:
            measures[f"remaining.eta2.{shown}"] = _jackknife(partial(_class_share, x, y), groups, level)


def _rank(x: Tensor, rows: Tensor) -> float:
    return effective_rank(spectrum(covariance_of(x[rows])).sqrt())


def _class_share(x: Tensor, labels: Tensor, rows: Tensor) -> float:
    return class_variance_share(x[rows], labels[rows])


def _jackknife(number: Callable[[Tensor], float], places: Tensor, level: float) -> Measure:
    """``number`` of all rows (it gets a mask) with the error ``√((K − 1) / K Σ_k (θ_k − θ̄)²)``, θ_k without group k, and its interval."""
    value = number(torch.ones_like(places, dtype=torch.bool))
    without = np.array([number(places != group) for group in places.unique()])
    if not np.isfinite(value) or len(without) < 3 or not np.isfinite(without).all():
        return Measure(value if np.isfinite(value) else None)
    error = float(np.sqrt((len(without) - 1) * without.var()))
    return around(value, error, level, len(without) - 1)


@torch.no_grad()
def unlabelled_pass(
    adapter: Adapter, batches: Iterable[tuple[int, Any]], collector: Collector, absence: str, size: int, seed: int
) -> SubsetRows:
    """Answers of all coalitions where there are no labels to score, on the first ``size`` rows."""
    names = list(collector.widths)
    remover = Remover(adapter.fuse, collector.widths, collector.reservoir.columns, collector.groups)
    rows = SubsetRows(None, names, size, seed)
    conditions = {k: v[0] for k, v in conditions_of(len(names), absence, 1).items() if k.startswith("coalition.")}
    for index, batch in batches:
        features = checked_features(adapter, batch, collector.widths, index)
        count = len(next(iter(features.values())))
        numbers = torch.arange(rows.rows, rows.rows + count)
        drawn = remover.drawn(numbers, collector.places(index, count), stream(seed, "donors", index))
        outputs = {int(k.split(".")[1]): remover.outputs(features, c, drawn) for k, c in conditions.items()}
        rows.add(index, outputs, None)
        if rows.rows >= size:
            break
    return rows


def _representation(adapter: Adapter, collector: Collector) -> Callable[[Mapping[str, Tensor]], Tensor]:
    if isinstance(collector.chain, ChainSums):
        chain = collector.chain
        return lambda features: chain.inputs(flat(features).float())[-1]
    return collector.represent if collector.sums else getattr(adapter, "represent", adapter.fuse)


def _measure(found: information.Information, level: float, freedom: float) -> Measure:
    """With its interval, where SciPy is installed."""
    if not np.isfinite(found.value):
        return Measure(None)
    try:
        return around(found.value, found.error, level, freedom)
    except MissingExtra:
        return Measure(found.value, found.error)
