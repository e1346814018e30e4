"""``diagnose``: from a model and data to a :class:`Diagnosis`, in two passes at constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast.errors import InputError

from .adapter import Adapter, HasAdapter, adapter_of, model_of
from .collect import Collector, checked_features
from .diagnosis import Diagnosis
from .estimates import Estimator, affordable, interval, reliance_measures, resampled
from .groups import draw_weights
from .layers import ChainSums, jacobian_rows
from .measures import weights
from .measures.polysemanticity import cross_modal_polysemanticity
from .measures.reliance import MAX_MODALITIES
from .options import DiagnoseOptions
from .passes import Batches, HasBatches, Progress, Stored, first_pass, second_pass, training_batches, training_rows
from .predictions import CoalitionScores
from .result import Measure, plain
from .sampled import latent_measures, neuron_measures, probe_measures
from .verdict import ModalityVerdict, agreement, judge_modality

__all__ = ["diagnose"]


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
            iterators, labels of the wrong kind. Without labels, with a single class or with more than 6 modalities the
            scores are left out and a note says so.

    Time for a head ``D → h → C`` on N samples: about ``N (2 D h + (D + h)² / 2)`` multiply-adds and ``N h² / 2`` bit operations,
    and 2^m forwards; memory ``O(groups · (D + h)²)``.
    """
    o = (options or DiagnoseOptions()).override(overrides)
    adapter = adapter_of(model)
    model_of(adapter)
    if probe_data is None:
        probe_data = training_batches(loader)
    training = None if probe_data is None else Batches(probe_data)
    batches = Batches(loader)
    stored = Stored(state, save_every, [o.groups, o.seed, o.sample_rows, o.metric])
    report = progress or (lambda phase, done, total: None)
    collector = first_pass(adapter, batches, o.groups, o.seed, o.sample_rows, stored, report)
    notes = list(collector.notes)
    scores = _scores(adapter, batches, collector, o, notes, stored, report)
    notes += [f"{name} is constant in these data, so its use cannot show." for name in _constant(collector)]
    report("numbers", 0, None)
    estimator = Estimator(collector, o.tolerance, o.tau, o.energy, o.ridge, o.initial_weight)
    measures, arrays, draws = _measures(estimator, scores, collector, o)
    if isinstance(collector.layers, ChainSums):
        if o.initial_weight is None:
            notes.append("No initial weights were given: the neural feature matrix is WᵀW, not that of W − W₀.")
        unimodal = o.unimodal_weights or getattr(adapter, "unimodal_weights", None)
        _weight_classifier(measures, notes, collector.layers.weights[0], collector.widths, unimodal, o.seed)
    else:
        arrays |= _neurons_by_gradient(adapter, batches, collector, estimator)
    if scores is not None and (o.probes or o.alone):
        given = _given(o.alone, collector, o.probes)
        rows = None
        if training is not None and (o.control or len(given) < len(collector.widths)):
            rows = training_rows(adapter, training, collector, report)
        probe_measures(measures, notes, collector, scores.metric, o.control, given, o.seed, rows)
    neuron_measures(measures, arrays, collector)
    latent_measures(measures, collector.reservoir, o.seed)
    bound = weights.collision_bound(list(collector.widths.values()))
    if bound.warning:
        notes.append(f"Collision bound: {bound.warning}.")
    verdicts = [_verdict(name, collector, measures, draws, scores, o) for name in collector.widths]
    settings = {
        "groups": o.groups, "resamples": o.resamples, "level": o.level, "seed": o.seed, "tolerance": o.tolerance,
        "tau": o.tau, "energy": o.energy, "ridge": o.ridge, "stand_in": "mean of these data",
        "sample_rows": len(collector.reservoir.keys), "probe_data": training is not None,
        "dictionary": "principal directions of each modality with 90 % of its variance",
        "agop": collector.layers.method(), "classes": collector.outputs, "adapter": collector.proof,
        "thresholds": asdict(o.thresholds),
    }  # fmt: skip
    stored.remove()
    return Diagnosis(
        dict(collector.widths), collector.samples, scores.metric if scores is not None else None, measures, plain(arrays),
        verdicts, settings, notes,
    )  # fmt: skip


def _scores(
    adapter: Adapter, batches: Batches, collector: Collector, o: DiagnoseOptions, notes: list[str], stored: Stored,
    report: Progress,
) -> CoalitionScores | None:  # fmt: skip
    """Scores of the coalitions, or None and a note that says why there are none."""
    if not o.reliance or not _can_score(collector, notes):
        return None
    chosen = o.metric or ("auroc" if collector.outputs <= 2 else "accuracy")
    means = dict(zip(collector.widths, _means(collector).split(list(collector.widths.values())), strict=True))
    scores = second_pass(adapter, batches, collector, chosen, means, stored, report)
    seen = scores.seen_classes()
    if 1 < seen < collector.outputs:
        notes.append(f"The labels hold {seen} classes and there are {collector.outputs} outputs.")
    if seen < 2:
        notes.append("The labels hold a single class, so nothing can be scored.")
        return None
    return scores


def _means(collector: Collector) -> Tensor:
    return collector.moments.combine(collector.active()).mean[: sum(collector.widths.values())]


def _constant(collector: Collector) -> list[str]:
    """Modalities without any variance."""
    variances = collector.moments.combine(collector.active()).covariance.diagonal()
    parts = variances[: sum(collector.widths.values())].split(list(collector.widths.values()))
    return [name for name, part in zip(collector.widths, parts, strict=True) if not bool(part.any())]


def _can_score(collector: Collector, notes: list[str]) -> bool:
    if not collector.labelled:
        notes.append("There are no labels, so nothing is scored: whether a modality helps is not said.")
        return False
    if len(collector.widths) > MAX_MODALITIES:
        notes.append(
            f"With more than {MAX_MODALITIES} modalities the 2^m coalitions are not scored; group some into one."
        )
        return False
    return True


def _measures(
    estimator: Estimator, scores: CoalitionScores | None, collector: Collector, o: DiagnoseOptions
) -> tuple[dict[str, Measure], dict[str, Any], dict[str, np.ndarray]]:
    """Measures of sums and coalitions, what is no single number, and both in the resamples."""
    arrays: dict[str, Any] = {}
    resamples, level, seed = o.resamples, o.level, o.seed
    active = collector.active()
    values = estimator.numbers(active, arrays)
    groups = int(active.sum())
    draws = np.zeros((resamples, len(active)))
    if groups >= 3 and resamples:
        draws[:, active > 0] = draw_weights(groups, resamples, seed)
    enough = affordable(resamples, collector.columns)
    spread = resampled(estimator.numbers, draws[:enough]) if groups >= 3 else {}
    measures = {name: interval(value, spread.get(name), groups, level, _limits(name)) for name, value in values.items()}
    measures |= {name: Measure(value) for name, value in estimator.fixed().items()}
    if scores is not None:
        names = list(collector.widths)
        plain = scores.scores(np.ones((1, len(active))))
        used = scores.rows > 0
        weights_of = np.zeros((resamples, len(active)))
        if used.sum() >= 3 and resamples:
            weights_of[:, used] = draw_weights(int(used.sum()), resamples, seed)
        if used.sum() >= 3 and resamples:
            spread |= reliance_measures(names, scores.scores(weights_of))
        for name, value in reliance_measures(names, plain).items():
            measures[name] = interval(float(value[0]), spread.get(name), int(used.sum()), level, _limits(name))
        measures["score.chance"] = Measure(scores.chance())
        arrays["coalition_scores"] = plain[:, 0].tolist()
    return measures, arrays, spread


def _limits(name: str) -> tuple[float, float]:
    """What a measure can be."""
    if name.startswith("shapley") or name.endswith("nfm_cosine"):
        return -1.0, 1.0
    if name.endswith(("_rank", "_degree")):
        return 0.0, math.inf
    return (1.0, math.inf) if name == "fused.vif" else (0.0, 1.0)


def _weight_classifier(
    measures: dict[str, Measure], notes: list[str], weight: Tensor, widths: dict[str, int], unimodal: Any, seed: int
) -> None:
    found = cross_modal_polysemanticity(weight, widths, unimodal, seed=seed)
    if found.not_applicable:
        notes.append(f"Cross-modal polysemanticity by the weight classifier is not applicable: {found.not_applicable}.")
        return
    measures["weight_classifier.cross_entropy"] = Measure(found.cross_entropy)
    measures["weight_classifier.entropy"] = Measure(found.entropy)
    measures["weight_classifier.accuracy"] = Measure(found.accuracy)


def _neurons_by_gradient(
    adapter: Adapter, batches: Batches, collector: Collector, estimator: Estimator
) -> dict[str, Any]:
    """Modality shares of up to 128 units of the fused representation: ``E[J_i Σ_ii J_iᵀ]`` on the first batch."""
    represent = getattr(adapter, "represent", None)
    if represent is None:
        return {}
    batch = next(iter(batches))[1]
    features = checked_features(adapter, batch, collector.widths, 0)
    count = collector.columns[1]
    units = torch.linspace(0, count - 1, min(count, 128)).round().long().tolist()
    sigma = collector.moments.combine(collector.active()).covariance[estimator.slices[0], estimator.slices[0]]
    shares = []
    for rows in jacobian_rows(lambda f: represent(f).flatten(1), features, units):
        gram = rows.double().cpu()
        parts, start = [], 0
        for width in collector.widths.values():
            block = gram[:, start : start + width]
            parts.append(float(((block @ sigma[start : start + width, start : start + width]) * block).sum()))
            start += width
        total = sum(parts)
        shares.append([max(p, 0.0) / total if total > 0 else 0.0 for p in parts])
    return {"neuron_shares": shares}


def _given(alone: Mapping[str, float] | None, collector: Collector, probes: bool) -> dict[str, float]:
    given = dict(alone or {})
    missing = [name for name in collector.widths if name not in given]
    if set(given) - set(collector.widths) or (missing and not probes):
        raise InputError(
            f"diagnose: alone has scores for {sorted(given)} and the modalities are {list(collector.widths)}; give known names, "
            "and all of them with probes=False"
        )
    return given


def _verdict(
    name: str,
    collector: Collector,
    measures: dict[str, Measure],
    draws: Mapping[str, np.ndarray],
    scores: CoalitionScores | None,
    o: DiagnoseOptions,
) -> ModalityVerdict:
    m, use = len(collector.widths), f"use_share.{name}"
    wanted = {
        "alone": f"alone.{name}", "all": "score.all", "without": f"without.{name}", "only": f"only.{name}",
        "chance": "score.chance", "retrained_without": f"retrained_without.{name}", "retrained_all": "retrained_all",
    }  # fmt: skip
    known: dict[str, float] | None = None
    if scores is not None:
        found = {key: measures[where].value for key, where in wanted.items() if where in measures}
        known = {key: value for key, value in found.items() if value is not None}
        known["chance_error"] = scores.chance_error()
    verdict = judge_modality(name, measures[use].value, m, known, o.thresholds)
    if use not in draws:
        return verdict
    rows: list[Mapping[str, float] | None] = [None] * len(draws[use])
    if known is not None:
        alone = measures.get(wanted["alone"], Measure(None))
        random = np.random.default_rng([o.seed, 11])
        rows = [
            known
            | {key: float(draws[wanted[key]][r]) for key in ("all", "without", "only")}
            | ({} if alone.value is None else {"alone": alone.value + (alone.error or 0.0) * random.standard_normal()})
            for r in range(len(draws["score.all"]))
        ]
    verdict.evidence["agreement"] = agreement(verdict.kind, name, m, draws[use].tolist(), rows, o.thresholds)
    return verdict
