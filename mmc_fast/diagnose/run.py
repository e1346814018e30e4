"""``diagnose``: from a model and data to a :class:`Diagnosis`, in two passes at constant memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError
from mmc_fast.experiments.data import MultimodalDataset, Part
from mmc_fast.experiments.training.model import MultimodalModel
from mmc_fast.experiments.training.runfolder import LoadedRun

from .adapter import Adapter, RunAdapter, model_of
from .collect import Collector, checked_features
from .estimates import Estimator, affordable, interval, reliance_measures, resampled
from .groups import draw_weights
from .layers import ChainSums, jacobian_rows
from .measures import weights
from .measures.polysemanticity import cross_modal_polysemanticity
from .measures.reliance import MAX_MODALITIES
from .passes import Batches, Progress, Stored, first_pass, second_pass, training_rows
from .predictions import CoalitionScores
from .result import Diagnosis, Measure, plain
from .sampled import fresh_measures, neuron_measures, probe_measures
from .verdict import THRESHOLDS, ModalityVerdict, Thresholds, agreement, as_settings, judge_modality

__all__ = ["check_options", "diagnose"]


def diagnose(
    model: Adapter | MultimodalModel | LoadedRun,
    loader: Iterable[Any] | MultimodalDataset | Part,
    *,
    metric: str | None = None,
    groups: int = 16,
    resamples: int = 100,
    level: float = 0.95,
    seed: int = 0,
    reliance: bool = True,
    probes: bool = True,
    control: bool = False,
    alone: Mapping[str, float] | None = None,
    unimodal_weights: Mapping[str, Tensor] | None = None,
    initial_weight: Tensor | None = None,
    probe_data: Iterable[Any] | MultimodalDataset | Part | None = None,
    sample_rows: int = 4096,
    tolerance: float = 1e-3,
    tau: float = 0.5,
    energy: float = 0.99,
    ridge: float = 1e-6,
    thresholds: Thresholds = THRESHOLDS,
    state: str | Path | None = None,
    save_every: float = 30.0,
    progress: Progress | None = None,
) -> Diagnosis:
    """Which modality a fused model uses, which it lost, and what its fusion neurons mix.

    Args:
        model: an adapter (:class:`~mmc_fast.diagnose.Adapter`, ``mmc_fast.ModelAdapter``), or a model or run of
            this project.
        loader: batches for the adapter, in a fixed order; it is read twice. Or a data set (its test part, and its training
            part as ``probe_data``) or a part.
        metric: "accuracy", "auroc" (two classes), or None: auroc for two classes, else accuracy.
        groups, resamples, level: uncertainty by a bootstrap over random groups of samples.
        seed: of groups, samples and probes.
        reliance: score all coalitions of modalities (needs labels, at most 6 modalities; 2^m forwards of the fusion).
        probes: train a small network on each modality's features alone, on ``sample_rows`` samples.
        control: also train networks on the features without each modality.
        alone: modality -> score, in the same metric, of a model of your own that knows this modality only. Better than the
            probe: a small network on few samples misses signal that is hard to learn, and a lost modality then looks weak.
        probe_data: labelled batches that the model was trained on, or others apart from ``loader``: the networks of ``probes``
            and ``control`` train on ``sample_rows`` of them and are judged on the diagnosed samples. Without it they train on
            seven tenths of those, which may be too few to find what a modality knows.
        unimodal_weights: modality -> ``[h_i, d_i]`` of unimodal models, for the weight classifier.
        initial_weight: first Linear layer of the head at initialisation, for the neural feature matrix.
        tolerance, tau, energy, ridge: of the numerical rank, the degree of polysemanticity (two) and the VIF.
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
    adapter, unimodal_weights = _adapter(model, unimodal_weights)
    model_of(adapter)
    if probe_data is None and isinstance(loader, MultimodalDataset) and len(loader.part("train")):
        probe_data = loader.part("train")
    training = None if probe_data is None else Batches(probe_data)
    check_options(groups, resamples, level, metric, sample_rows, alone)
    groups, resamples, sample_rows, seed = int(groups), int(resamples), int(sample_rows), check_seed(seed)
    batches = Batches(loader)
    meaning = [groups, seed, sample_rows, metric]
    stored = Stored(state, save_every, meaning)
    report = progress or (lambda phase, done, total: None)
    with torch.inference_mode(False):
        collector = first_pass(adapter, batches, groups, seed, sample_rows, stored, report)
        notes = list(collector.notes)
        means = dict(zip(collector.widths, _means(collector).split(list(collector.widths.values())), strict=True))
        scores = None
        if reliance and _can_score(collector, notes):
            chosen = metric or ("auroc" if collector.outputs <= 2 else "accuracy")
            scores = second_pass(adapter, batches, collector, chosen, means, stored, report)
            seen = scores.seen_classes()
            if 1 < seen < collector.outputs:
                notes.append(f"The labels hold {seen} classes and there are {collector.outputs} outputs.")
            if seen < 2:
                notes.append("The labels hold a single class, so nothing can be scored.")
                scores = None
    notes += [f"{name} is constant in these data, so its use cannot show." for name in _constant(collector)]
    report("numbers", 0, None)
    estimator = Estimator(collector, tolerance, tau, energy, ridge, initial_weight)
    measures, arrays, draws = _measures(estimator, scores, collector, resamples, level, seed)
    if isinstance(collector.layers, ChainSums):
        if initial_weight is None:
            notes.append("No initial weights were given: the neural feature matrix is WᵀW, not that of W − W₀.")
        _weight_classifier(measures, notes, collector.layers.weights[0], collector.widths, unimodal_weights, seed)
    else:
        arrays |= _neurons_by_gradient(adapter, batches, collector, estimator)
    if scores is not None and (probes or alone):
        given = _given(alone, collector, probes)
        rows = None
        if training is not None and (control or len(given) < len(collector.widths)):
            rows = training_rows(adapter, training, collector, report)
        probe_measures(measures, notes, collector, scores.metric, control, given, seed, rows)
    neuron_measures(measures, arrays, collector)
    fresh_measures(measures, collector.reservoir, seed)
    bound = weights.collision_bound(list(collector.widths.values()))
    if bound.warning:
        notes.append(f"Collision bound: {bound.warning}.")
    verdicts = [_verdict(name, collector, measures, draws, scores, thresholds, seed) for name in collector.widths]
    settings = {
        "groups": groups, "resamples": resamples, "level": float(level), "seed": seed, "tolerance": float(tolerance), "tau": float(tau),
        "energy": float(energy), "ridge": float(ridge), "stand_in": "mean of these data", "sample_rows": len(collector.reservoir.keys),
        "probe_data": training is not None,
        "dictionary": "principal directions of each modality with 90 % of its variance",
        "agop": collector.layers.method(), "classes": collector.outputs, "thresholds": as_settings(thresholds),
    }  # fmt: skip
    stored.remove()
    return Diagnosis(
        dict(collector.widths), collector.samples, scores.metric if scores is not None else None, measures, plain(arrays),
        verdicts, settings, notes,
    )  # fmt: skip


def _adapter(model: Any, unimodal: Mapping[str, Tensor] | None) -> tuple[Adapter, Mapping[str, Tensor] | None]:
    if isinstance(model, LoadedRun):
        if unimodal is None and model.unimodal is not None:
            unimodal = {name: m.classifier[0].weight for name, m in model.unimodal.models.items()}  # type: ignore[misc]
        model = model.model
    if isinstance(model, MultimodalModel):
        return RunAdapter(model), unimodal
    if isinstance(model, Adapter):
        return model, unimodal
    if isinstance(model, nn.Module):
        raise InputError(
            f"diagnose: {type(model).__name__} has no encode() and fuse(); wrap it: "
            "mmc_fast.ModelAdapter(model, features={'image': 'encoders.image', ...}, head='classifier')"
        )
    raise TypeError(f"diagnose: got {type(model).__name__}; give an adapter with encode(batch) and fuse(features)")


def check_options(
    groups: int = 16,
    resamples: int = 100,
    level: float = 0.95,
    metric: str | None = None,
    rows: int = 1,
    alone: Mapping[str, float] | None = None,
) -> None:
    """Raise InputError for options of :func:`diagnose` that no data could make right."""
    if not 1 <= groups <= 1024 or resamples < 0 or not 0 < level < 1:
        raise InputError(
            f"diagnose: groups {groups}, resamples {resamples}, level {level}; need 1 to 1024 groups, resamples >= 0 and a "
            "level between 0 and 1"
        )
    if metric not in (None, "accuracy", "auroc"):
        raise InputError(f"diagnose: unknown metric {metric!r}; known are accuracy, auroc")
    if rows < 1:
        raise InputError(f"diagnose: sample_rows is {rows}; give the number of rows to keep for probes, such as 4096")
    for name, score in (alone or {}).items():
        if not 0 <= score <= 1:
            raise InputError(f"diagnose: alone[{name!r}] is {score}; give a score between 0 and 1, not in percent")


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
    estimator: Estimator, scores: CoalitionScores | None, collector: Collector, resamples: int, level: float, seed: int
) -> tuple[dict[str, Measure], dict[str, Any], dict[str, np.ndarray]]:
    """Measures of sums and coalitions, what is no single number, and both in the resamples."""
    arrays: dict[str, Any] = {}
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
    thresholds: Thresholds,
    seed: int,
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
    verdict = judge_modality(name, measures[use].value, m, known, thresholds)
    if use not in draws:
        return verdict
    rows: list[Mapping[str, float] | None] = [None] * len(draws[use])
    if known is not None:
        alone = measures.get(wanted["alone"], Measure(None))
        random = np.random.default_rng([seed, 11])
        rows = [
            known
            | {key: float(draws[wanted[key]][r]) for key in ("all", "without", "only")}
            | ({} if alone.value is None else {"alone": alone.value + (alone.error or 0.0) * random.standard_normal()})
            for r in range(len(draws["score.all"]))
        ]
    verdict.evidence["agreement"] = agreement(verdict.kind, name, m, draws[use].tolist(), rows, thresholds)
    return verdict
