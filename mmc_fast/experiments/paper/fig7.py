"""Figures 7 and 8: the score when one modality is noisy in training."""

from __future__ import annotations

import numpy as np

from mmc_fast.diagnose.figures import lines
from mmc_fast.diagnose.statistics import ResampledScores, average

from ..report.drawings import metric_name
from ..training import predict
from .base import Direction, Experiment, Outcome, Plan, ResultTable, Value
from .bench import METHODS, Bench, by_source, curve, described, estimate, resampled
from .pieces import Measurement, Task, Values

__all__ = ["FIGURE_7", "RATES", "measure"]

RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5)


def measure(task: Task) -> tuple[Values, dict[str, np.ndarray]]:
    """Class probabilities on the test part, which is never noisy."""
    test = task.dataset("model").part("test")
    found = predict(task.run("model").model, test.features, test.present, on_empty="prior")
    return {}, {"labels": test.labels.numpy(), "probabilities": found.numpy()}


Curve = dict[float, ResampledScores | None]


def _run(plan: Plan) -> Outcome:
    return by_source(plan, FIGURE_7.sources(plan), _one)


def _one(bench: Bench) -> Outcome:
    seeds, titles, data = bench.plan.seeds, bench.titles(), bench.source.name
    weakest = list(bench.strengths())[-1]

    def changes(rate: float) -> dict[str, object]:
        return {"noise_modality": weakest, "noise_rate": rate} if rate else {}

    found = bench.measure(
        {
            (row, rate, seed): Measurement(
                measure, f"{row}-{round(100 * rate)}", data, seed, {"model": bench.training(row, seed, changes(rate))}
            )
            for row in METHODS
            for rate in RATES
            for seed in seeds
        }
    )
    curves: dict[str, Curve] = {
        row: {rate: resampled(bench.metric, [found[row, rate, s] for s in seeds], "probabilities") for rate in RATES}
        for row in METHODS
    }
    columns = [f"r = {rate:g}" for rate in RATES] + ["slope"]
    rows = [(titles[row], [_value(s) for s in (*curves[row].values(), slope(curves[row]))]) for row in METHODS]
    title = f"Figure 7 on {data}: test {metric_name(bench.metric)} with noise of rate r on {weakest} in training"
    table = ResultTable(title, columns, rows)
    directions = []
    for row in METHODS[1:]:
        for words, kind in (("is above vanilla under noise", noisy_mean), ("loses less to noise than vanilla", slope)):
            mine, other = kind(curves[row]), kind(curves["vanilla"])
            ours = estimate(None if mine is None or other is None else mine - other)
            directions.append(Direction(f"{titles[row]} {words}, {data}", 1.0, ours, printed=False))
    falls = estimate(slope(curves["vanilla"]))
    directions.insert(0, Direction(f"vanilla falls with the noise, {data}", -1.0, falls, printed=False))
    series = {
        name: curve({rate: _value(scores) for rate, scores in curves[row].items()}) for row, name in titles.items()
    }
    drawing = lines(
        f"{data}: noise on {weakest} in training",
        series,
        x_label="noise rate r",
        y_label=metric_name(bench.metric),
        alt=f"Test score on {data} as the noise on {weakest} grows from 0 to {RATES[-1]:g}. {described(series)}.",
        caption="Band: s.d. over seeds.",
    )
    facts = {f"noisy modality of {data}": weakest}
    return Outcome([table], directions, {"noise": drawing}, bench.notes(found), facts)


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


FIGURE_7 = Experiment(
    "fig7",
    "Noise on the weakest modality in training",
    "Figures 7 and 8: test score as noise on the weakest modality grows, for vanilla, KD and EBR. They print no numbers; that "
    "KD and EBR, which denoise, lose less is what the paper's argument implies.",
    (
        "By default mfeat (digits) and support2 (death in hospital) in place of the paper's data; the weakest modality by unimodal "
        "validation score.",
        "Noise is uniform, `(1 − r) x + r U std(x)` with U on [−1, 1], drawn afresh in every step; validation and test parts are "
        "never noisy.",
    ),
    ("mfeat", "support2"),
    _run,
)
