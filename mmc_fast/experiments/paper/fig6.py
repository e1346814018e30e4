"""Figure 6: how fast the training loss falls."""

from __future__ import annotations

import math

import numpy as np

from mmc_fast.diagnose.figures import Line, lines

from .base import Experiment, Outcome, Plan, ResultTable
from .bench import METHODS, Bench, Series, by_source, direction, value
from .pieces import Measured, Measurement, Task, Values

__all__ = ["FIGURE_6", "measure"]


def measure(task: Task) -> tuple[Values, dict[str, np.ndarray]]:
    """Training L_sem by epoch; an epoch of L_md alone has none."""
    history = [r for r in task.run("model").results["history"] if r["stage"] == "train"]
    known = [(r["epoch"], r["loss_sem"]) for r in history if r["loss_sem"] is not None]
    return {"epochs": [e for e, _ in known], "loss_sem": [v for _, v in known]}, {}


_COLUMNS = ("first epoch", "half of the epochs", "last epoch", "mean of ln L_sem")


def _run(plan: Plan) -> Outcome:
    notes = [
        "EBR robust descends the mean of the losses on complete and on masked rows, which is higher by its nature."
    ]
    return by_source(plan, FIGURE_6.sources(plan), _one, selection="last", notes=notes)


def _one(bench: Bench) -> Outcome:
    seeds, titles, data = bench.plan.seeds, bench.titles(), bench.source.name
    rate = {"lr": bench.training("vanilla", 0).config["lr"]}
    found = bench.measure(
        {
            (row, seed): Measurement(measure, row, data, seed, {"model": bench.training(row, seed, rate)})
            for row in METHODS
            for seed in seeds
        }
    )
    numbers: dict[tuple[str, str], Series] = {}
    for row in METHODS:
        by_seed = [_summary(found[row, seed]) for seed in seeds]
        numbers |= {(row, name): [s.get(name) for s in by_seed] for name in _COLUMNS}
    table = ResultTable(
        f"Figure 6 on {data}: training L_sem",
        _COLUMNS,
        [(titles[row], [value(numbers[row, name]) for name in _COLUMNS]) for row in METHODS],
        digits=4,
    )
    directions = []
    for row in METHODS[1:]:
        for name, words in (("mean of ln L_sem", "falls faster than that of"), ("last epoch", "ends below that of")):
            claim = f"training loss of {titles[row]} {words} vanilla, {data}"
            pair = numbers[row, name], numbers["vanilla", name]
            directions.append(direction(claim, -1.0, *pair, printed=False))
    curves = {}
    for row, title in titles.items():
        whole = [m.values for seed in seeds if (m := found[row, seed]).diverged is None]
        if whole:
            values = np.log10([v["loss_sem"] for v in whole])
            spread = values.std(0, ddof=1).tolist() if len(whole) > 1 else None
            curves[title] = Line(whole[0]["epochs"], values.mean(0).tolist(), spread)
    drawing = lines(
        f"{data}: training loss",
        curves,
        x_label="epoch",
        y_label="log10 of the training L_sem",
        alt=f"Training loss on {data} by epoch, log10, first and last: "
        + "; ".join(f"{name} {line.y[0]:.2f}, {line.y[-1]:.2f}" for name, line in curves.items()),
        caption="Band: s.d. over seeds.",
        markers=False,
    )
    return Outcome([table], directions, {"convergence": drawing}, bench.notes(found))


def _summary(found: Measured) -> dict[str, float]:
    losses = found.values.get("loss_sem")
    if not losses:
        return {}
    mean = sum(math.log(max(v, 1e-12)) for v in losses) / len(losses)
    return dict(zip(_COLUMNS, (losses[0], losses[(len(losses) - 1) // 2], losses[-1], mean), strict=True))


FIGURE_6 = Experiment(
    "fig6",
    "How fast the training loss falls",
    "Figures 6 and 9: training loss by epoch for vanilla, KD and EBR. They print no numbers; that it falls faster and lower "
    "with KD and EBR is what the paper's argument implies.",
    (
        "By default mfeat (digits) in place of the paper's data; L_sem is the cross-entropy of the fused prediction, a mean over the steps "
        "of an epoch. Distillation comes before the first epoch and is not counted.",
        "All methods have the learning rate that the search chose for vanilla, so that the curves compare at one rate.",
    ),
    ("mfeat",),
    _run,
)
