"""Figure 6: how fast the training loss falls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmc_fast.diagnose.figures import Line

from ..jobs import Result, Values, Workspace
from .base import Outcome, Plan, ResultTable, declare
from .inside import METHODS, Bench, Models, Series, by_data, direction, draw_curves, value

_COLUMNS = ("first epoch", "half of the epochs", "last epoch", "mean of ln L_sem")


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Training L_sem by epoch; an epoch of L_md alone has none."""
    history = [r for r in Models(settings, workspace).run("model").results["history"] if r["stage"] == "train"]
    known = [(r["epoch"], r["loss_sem"]) for r in history if r["loss_sem"] is not None]
    return {"epochs": [e for e, _ in known], "loss_sem": [v for _, v in known]}, {}


def _run(plan: Plan) -> Outcome:
    notes = [
        "EBR robust descends the mean of the losses on complete and on masked rows, which is higher by its nature."
    ]
    return by_data(plan, _one, selection="last", notes=notes)


def _one(bench: Bench) -> Outcome:
    data = bench.data.name
    rate = {"lr": bench.training("vanilla", 0).settings["config"]["lr"]}
    found = bench.measure(measure, lambda method, _, seed: {"model": bench.training(method, seed, rate)})
    numbers: dict[tuple[str, str], Series] = {}
    curves = {}
    for m, title in bench.titles.items():
        by_seed = [_summary(r) for r in found.of(m)]
        numbers |= {(m, name): [s.get(name) for s in by_seed] for name in _COLUMNS}
        whole = [r.values for r in found.of(m) if not r.failed]
        if whole:
            values = np.log10([v["loss_sem"] for v in whole])
            spread = values.std(0, ddof=1).tolist() if len(whole) > 1 else None
            curves[title] = Line(whole[0]["epochs"], values.mean(0).tolist(), spread)
    rows = [(title, [value(numbers[m, name]) for name in _COLUMNS]) for m, title in bench.titles.items()]
    table = ResultTable(f"Figure 6 on {data}: training L_sem", _COLUMNS, rows, digits=4)
    directions = []
    for m in METHODS[1:]:
        for name, words in (("mean of ln L_sem", "falls faster than that of"), ("last epoch", "ends below that of")):
            claim = f"training loss of {bench.titles[m]} {words} vanilla, {data}"
            directions.append(direction(claim, -1.0, numbers[m, name], numbers["vanilla", name], printed=False))
    about = f"Training loss on {data} by epoch, log10."
    y_label = "log10 of the training L_sem"
    drawing = draw_curves(f"{data}: training loss", curves, "epoch", y_label, about, markers=False)
    return Outcome([table], directions, {"convergence": drawing}, bench.notes(found))


def _summary(found: Result) -> dict[str, float]:
    losses = found.values.get("loss_sem")
    if not losses:
        return {}
    mean = sum(math.log(max(v, 1e-12)) for v in losses) / len(losses)
    return dict(zip(_COLUMNS, (losses[0], losses[(len(losses) - 1) // 2], losses[-1], mean), strict=True))


FIGURE_6 = declare("fig6", _run)
