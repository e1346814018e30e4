"""Figures 7 and 8: the score when one modality is noisy in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mmc_fast.diagnose.statistics import ResampledScores, average

from ..jobs import Values, Workspace
from ..report.drawings import metric_name
from ..training import predict
from .base import Direction, Outcome, Plan, ResultTable, Value, declare
from .inside import METHODS, Bench, Models, by_data, curve, draw_curves, estimate, resampled

RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
Curve = dict[float, ResampledScores | None]


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Class probabilities on the test part, which is never noisy."""
    models = Models(settings, workspace)
    test = models.data("model").part("test")
    found = predict(models.run("model").model, test.features, test.present, on_empty="prior")
    return {}, {"labels": test.labels.numpy(), "probabilities": found.numpy()}


def _run(plan: Plan) -> Outcome:
    return by_data(plan, _one)


def _one(bench: Bench) -> Outcome:
    data, titles = bench.data.name, bench.titles
    weakest = list(bench.strengths())[-1]

    def changes(rate: float) -> dict[str, object]:
        return {"noise_modality": weakest, "noise_rate": rate} if rate else {}

    found = bench.measure(
        measure, lambda method, rate, seed: {"model": bench.training(method, seed, changes(rate))}, variants=RATES
    )
    curves: dict[str, Curve] = {
        m: {rate: resampled(bench.metric, found.of(m, rate), "probabilities") for rate in RATES} for m in METHODS
    }
    columns = [f"r = {rate:g}" for rate in RATES] + ["slope"]
    rows = [(titles[m], [_value(s) for s in (*curves[m].values(), slope(curves[m]))]) for m in METHODS]
    title = f"Figure 7 on {data}: test {metric_name(bench.metric)} with noise of rate r on {weakest} in training"
    falls = estimate(slope(curves["vanilla"]))
    directions = [Direction(f"vanilla falls with the noise, {data}", -1.0, falls, printed=False)]
    for m in METHODS[1:]:
        for words, kind in (("is above vanilla under noise", noisy_mean), ("loses less to noise than vanilla", slope)):
            mine, other = kind(curves[m]), kind(curves["vanilla"])
            ours = estimate(None if mine is None or other is None else mine - other)
            directions.append(Direction(f"{titles[m]} {words}, {data}", 1.0, ours, printed=False))
    series = {name: curve({rate: _value(s) for rate, s in curves[m].items()}) for m, name in titles.items()}
    about = f"Test score on {data} as the noise on {weakest} grows from 0 to {RATES[-1]:g}."
    heading, y_label = f"{data}: noise on {weakest} in training", metric_name(bench.metric)
    drawing = draw_curves(heading, series, "noise rate r", y_label, about)
    facts = {f"noisy modality of {data}": weakest}
    return Outcome(
        [ResultTable(title, columns, rows)], directions, {"noise": drawing}, bench.notes(found), facts
    )  # fmt: skip


def slope(curve: Curve) -> ResampledScores | None:
    """Least-squares slope of the score against the rate, for each seed and resample."""
    rates = np.array(list(curve))
    weights = (rates - rates.mean()) / np.square(rates - rates.mean()).sum()
    known = [s for s in curve.values() if s is not None]
    if len(known) < len(weights):
        return None
    return ResampledScores(
        sum(w * s.plain for w, s in zip(weights, known, strict=True)),
        sum(w * s.resampled for w, s in zip(weights, known, strict=True)),
    )


def noisy_mean(curve: Curve) -> ResampledScores | None:
    """Mean score over the rates above 0."""
    known = [s for rate, s in curve.items() if s is not None and rate > 0]
    return average(known) if len(known) == sum(rate > 0 for rate in curve) else None


def _value(scores: ResampledScores | None) -> Value:
    return Value() if scores is None else Value.over(list(scores.plain))


FIGURE_7 = declare("fig7", _run)
