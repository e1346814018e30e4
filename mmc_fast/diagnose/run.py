"""``diagnose``: from a model and data to a :class:`Diagnosis`, in two passes at constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmc_fast.errors import InputError

from .absence import absence_of, draws_for, has_own_mask
from .adapter import Adapter, HasAdapter, adapter_of, model_of
from .alignment import EffectRows
from .collect import Collector
from .diagnosis import Diagnosis
from .estimates import Estimator, affordable, interval, reliance_measures, resampled
from .evidence import verdicts_of
from .further import emap_measures, information_measures, remaining_measures, unlabelled_pass, utilisation_measures
from .groups import draw_weights
from .heads import head_measures
from .measures import weights
from .measures.reliance import MAX_MODALITIES, Afresh
from .options import DiagnoseOptions
from .passes import Batches, HasBatches, Progress, Stored, first_pass, second_pass, training_batches, training_rows
from .predictions import ConditionScores
from .result import Measure, plain
from .sampled import latent_measures, neuron_measures, probe_measures
from .subsets import SubsetRows
from .tasks import BOUNDED, metric_name

FEWEST = 30
"""Samples without which nothing is judged."""


@torch.enable_grad()
@torch.inference_mode(False)
def diagnose(
    model: Adapter | HasAdapter,
    loader: Iterable[Any] | HasBatches,
    *,
    options: DiagnoseOptions | None = None,
    probe_data: Iterable[Any] | HasBatches | None = None,
    state: str | Path | None = None,
    save_every: float = 30.0,
    progress: Progress | None = None,
    **overrides: Any,
) -> Diagnosis:
    """Which modality a fused model uses, which it lost, and what its fusion neurons mix.

    Args:
        model: an adapter (:class:`~mmc_fast.diagnose.Adapter`, ``mmc_fast.ModelAdapter``), or what has ``as_adapter()``,
            such as a loaded run.
        loader: batches for the adapter, in a fixed order; it is read twice. Or what has ``batches()``, such as a data set
            (its test part; its ``training_batches()`` are the ``probe_data``).
        options: what is measured, and how (:class:`DiagnoseOptions`). ``overrides``: single fields of them by name, such
            as ``diagnose(adapter, loader, seed=1, control=True)``.
        probe_data: labelled batches that the model was trained on, or others apart from ``loader``: the networks of ``probes``
            and ``control`` train on ``sample_rows`` of them and are judged on the diagnosed samples. Without it they train on
            seven tenths of those, which may be too few to find what a modality knows.
        state: file that keeps unfinished sums; a diagnosis that was killed goes on there, with the same numbers.
        save_every: seconds between two writes of it.
        progress: called with a phase, the batches done and their number (None where unknown).

    Returns a :class:`Diagnosis`. The model is not changed.

    Raises:
        InputError: a model in training mode, features or logits that are not finite or not of fixed width, one-shot
            iterators, labels of the wrong kind. Without labels or with a single class the scores are left out and a note says so.

    Time for a head ``D → h → C`` on N samples: about ``N (2 D h + (D + h)² / 2)`` multiply-adds and ``N h² / 2`` bit operations,
    and (2^m + m) · draws forwards of the fusion; memory ``O(groups · (D + h)²)``.

    Examples:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.a, self.b, self.classifier = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(16, 2)
        ...
        ...     def forward(self, a, b):
        ...         return self.classifier(torch.cat([self.a(a), self.b(b)], 1))
        >>> adapter = mmc_fast.ModelAdapter(Model().eval(), {"a": "a", "b": "b"}, head="classifier")
        >>> batches = [(torch.randn(200, 6), torch.randn(200, 4), torch.randint(2, (200,))) for _ in range(2)]
        >>> diagnosis = mmc_fast.diagnose(adapter, batches, probes=False)
        >>> diagnosis.n_samples, [verdict.modality for verdict in diagnosis.verdicts]
        (400, ['a', 'b'])
    """
    o = (options or DiagnoseOptions()).override(overrides)
    adapter = adapter_of(model)
    if o.metric is None:
        o = o.override({"metric": getattr(adapter, "metric", None)})
    model_of(adapter)
    if probe_data is None:
        probe_data = training_batches(loader)
    training = None if probe_data is None else Batches(probe_data)
    batches = Batches(loader)
    absence = absence_of(adapter, o.absence)
    meaning = [o.groups, o.seed, o.sample_rows, metric_name(o.metric), absence, o.draws, o.agop]
    stored = Stored(state, save_every, meaning)
    report = progress or (lambda phase, done, total: None)
    with stored.blamed():
        collector = first_pass(adapter, batches, o, stored, report)
        notes = list(collector.notes)
        scores, answers, effects = _scores(adapter, batches, collector, absence, o, notes, stored, report)
    if collector.samples < FEWEST:
        notes.append(f"{collector.samples} samples are too few to judge; give at least {FEWEST}.")
    report("numbers", 0, None)
    measures, arrays, draws = _measures(collector, scores, o)
    if o.agop:
        head_measures(adapter, batches, collector, o, measures, arrays, notes)
    probes: dict[str, Afresh] = {}
    if scores is not None and scores.task.kind != "pairs" and (o.probes or o.alone):
        given = _given(o.alone, collector, o.probes)
        known = [name for name in collector.widths if name in given or f"alone.{name}" in measures]
        rows = None
        if training is not None and (o.control or len(known) < len(collector.widths)):
            rows = training_rows(adapter, training, collector, report)
        probes = probe_measures(measures, notes, collector, o, given, rows)
    if effects is not None:
        measures |= effects.measures(probes, o.resamples, o.level)
    if o.agop:
        neuron_measures(measures, arrays, collector)
        latent_measures(measures, collector.reservoir, o.seed)
        bound = weights.collision_bound(list(collector.widths.values()))
        if bound.warning:
            notes.append(f"Collision bound: {bound.warning}.")
    if answers is not None and o.agop:
        more, tables = answers.measures(o.resamples, o.level, o.samples)
        measures |= more
        arrays |= tables
    emap_rows = _further(adapter, batches, collector, scores, o, measures, arrays, notes)
    verdicts = verdicts_of(collector, measures, draws, scores, absence, o)
    if collector.samples < FEWEST:
        verdicts = [replace(verdict, kind="undecided") for verdict in verdicts]
    settings = {
        "groups": o.groups, "resamples": o.resamples, "level": o.level, "seed": o.seed, "tolerance": o.tolerance,
        "tau": o.tau, "energy": o.energy, "ridge": o.ridge, "absence": absence,
        "draws": draws_for(collector.samples, o.draws), "own_mask": has_own_mask(adapter),
        "sample_rows": len(collector.reservoir.keys), "probe_data": training is not None,
        "dictionary": "principal directions of each modality with 90 % of its variance",
        "agop": collector.layers.method() if o.agop else None, "classes": collector.outputs, "adapter": collector.proof, "emap_rows": emap_rows,
        "auroc_error": None if scores is None or "auroc" not in scores.task.metric else max(float(r.errors().max()) for r in scores.ranked),
        "task": None if collector.task is None else collector.task.kind, "thresholds": asdict(o.thresholds),
    }  # fmt: skip
    stored.remove()
    metric = scores.task.metric if scores is not None else None
    return Diagnosis(
        dict(collector.widths), collector.samples, metric, measures, plain(arrays), verdicts, settings, notes
    )


def _further(
    adapter: Adapter, batches: Batches, collector: Collector, scores: ConditionScores | None, o: DiagnoseOptions,
    measures: dict[str, Measure], arrays: dict[str, Any], notes: list[str],
) -> int | None:  # fmt: skip
    """What the kept rows and the first batches tell besides; returns the rows of EMAP, if asked for."""
    classes = scores is not None and scores.task.kind == "classes"
    if classes and o.agop:
        information_measures(measures, arrays, notes, collector, o.level)
    if o.utilisation and classes:
        utilisation_measures(measures, notes, collector, o)
    if o.remaining:
        remaining_measures(measures, adapter, batches, collector, o.seed, o.level)
    if o.emap and scores is not None and len(collector.widths) > 1:
        return emap_measures(measures, adapter, batches, collector, scores.task, o.seed, o.level)
    return None


def _scores(
    adapter: Adapter, batches: Batches, collector: Collector, absence: str, o: DiagnoseOptions, notes: list[str],
    stored: Stored, report: Progress,
) -> tuple[ConditionScores | None, SubsetRows | None, EffectRows | None]:  # fmt: skip
    """Scores of the conditions and answers on a sample of rows, or None and a note that says why there are none."""
    if not o.reliance:
        return None, None, None
    if not _can_score(collector, notes):
        few = len(collector.widths) <= MAX_MODALITIES
        rows = unlabelled_pass(adapter, batches, collector, absence, o.sample_rows, o.seed) if few else None
        return None, rows, None
    scores, answers, effects = second_pass(adapter, batches, collector, absence, o, stored, report)
    if scores.task.kind == "classes":
        seen = scores.seen_classes()
        if 1 < seen < collector.outputs:
            notes.append(f"The labels hold {seen} classes and there are {collector.outputs} outputs.")
        if seen < 2:
            notes.append("The labels hold a single class, so nothing can be scored.")
            return None, None, None
    if not math.isfinite(scores.whole()):
        notes.append(f"The labels allow no {scores.task.metric}: they are all alike, so nothing can be scored.")
        return None, None, None
    return scores, answers, effects


def _can_score(collector: Collector, notes: list[str]) -> bool:
    if not collector.labelled:
        notes.append("There are no labels, so nothing is scored: whether a modality helps is not said.")
        return False
    if len(collector.widths) > MAX_MODALITIES:
        notes.append(
            f"With more than {MAX_MODALITIES} modalities the 2^m coalitions are not scored; each Shapley value is the mean of the "
            "first and the last marginal contribution alone."
        )
    return True


def _measures(
    collector: Collector, scores: ConditionScores | None, o: DiagnoseOptions
) -> tuple[dict[str, Measure], dict[str, Any], dict[str, np.ndarray]]:
    """Measures of sums and conditions, what is no single number, and both in the resamples."""
    arrays: dict[str, Any] = {}
    measures: dict[str, Measure] = {}
    spread: dict[str, np.ndarray] = {}
    if o.agop:
        estimator = Estimator(collector, o.tolerance, o.tau, o.energy, o.ridge, o.initial_weight)
        active = collector.active()
        values, groups = estimator.numbers(active, arrays), int(active.sum())
        draws = _drawn(active > 0, affordable(o.resamples, collector.columns), o.seed)
        if groups >= 3:
            spread |= resampled(estimator.numbers, draws)
        measures |= {n: interval(value, spread.get(n), groups, o.level, _limits(n)) for n, value in values.items()}
        measures |= {name: Measure(value) for name, value in estimator.fixed().items()}
    if scores is not None:
        names, used = list(collector.widths), scores.rows > 0
        groups = int(used.sum())

        def numbers(of: np.ndarray) -> dict[str, np.ndarray]:
            return reliance_measures(names, scores.scores(of), scores.chance(of), scores.total_effects(of))

        draws = _drawn(used, o.resamples, o.seed)
        if groups >= 3 and len(draws):
            spread |= numbers(draws)
        plain = numbers(np.ones((1, len(used))))
        for name, value in plain.items():
            low_high = (-math.inf, math.inf) if scores.task.metric not in BOUNDED else _limits(name)
            measures[name] = interval(float(value[0]), spread.get(name), groups, o.level, low_high)
        measures["score.chance"] = Measure(float(plain["score.chance"][0]))
        found = scores.scores(np.ones((1, len(used))))
        chance = scores.chance()
        if len(names) <= MAX_MODALITIES:
            arrays["coalition_scores"] = [float(found.get(f"coalition.{c}", chance)[0]) for c in range(2 ** len(names))]
    return measures, arrays, spread


def _drawn(active: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Group weights of the resamples, ``[R, K]``; groups without samples are never drawn."""
    groups = int(active.sum())
    draws = np.zeros((resamples if groups >= 3 else 0, len(active)))
    if len(draws):
        draws[:, active] = draw_weights(groups, resamples, seed)
    return draws


def _limits(name: str) -> tuple[float, float]:
    """What a measure can be."""
    if name.startswith("total_effect"):
        return 0.0, math.inf
    if name.startswith(("shapley", "resampled_shapley")) or name.endswith("nfm_cosine"):
        return -1.0, 1.0
    if name.endswith(("_rank", "_degree")):
        return 0.0, math.inf
    return (1.0, math.inf) if name == "fused.vif" else (0.0, 1.0)


def _given(alone: Mapping[str, float] | None, collector: Collector, probes: bool) -> dict[str, float]:
    given = dict(alone or {})
    missing = [name for name in collector.widths if name not in given]
    if set(given) - set(collector.widths) or (missing and not probes):
        raise InputError(
            f"diagnose: alone has scores for {sorted(given)} and the modalities are {list(collector.widths)}; give known names, "
            "and all of them with probes=False"
        )
    return given
