"""Figure 5 and table 11: rank of the fused representation as the weakest modality is given more weight."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import numpy as np

from mmc_fast.diagnose.measures.blocks import ranks, spectrum
from mmc_fast.diagnose.measures.similarity import covariance_of, linear_cka

from ..jobs import Values, Workspace
from .base import Direction, Outcome, Plan, ResultTable, declare
from .inside import METHODS, Bench, Found, Models, alone, by_data, curve, direction, draw_curves, fused, number, value
from .paper import TABLE11

BETAS = (0, 2, 4, 6, 8)
TOLERANCE = 1e-2
_PAPER = {"vanilla": "vanilla", "kd": "kd", "ebr-paper": "ebr", "ebr-robust": "ebr"}
_FORMS = {"features": "features scaled by 1 + β", "loss": "L_sem + β L_sem of that modality"}
_RANKS = {
    "numerical": f"numerical rank (singular values above {TOLERANCE:g} of the largest)",
    "effective": "effective rank",
    "stable": "stable rank",
}
_CKA = {"strongest": "CKA with the strongest modality", "weakest": "CKA with the weakest modality"}


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Three ranks of the fused representation on the test part, and its linear CKA with two modalities.

    Trainings: "model", and "unimodal", whose encoders give the representations of ``options["strongest"]`` and
    ``options["weakest"]``.
    """
    models = Models(settings, workspace)
    dataset, options = models.data("model"), models.options
    test = dataset.part("test")
    x = fused(models.run("model").model, test)
    found = ranks(spectrum(covariance_of(x)).sqrt(), float(options["tolerance"]))
    unimodal = models.run("unimodal").unimodal
    values: Values = {"numerical": found.numerical, "effective": found.effective, "stable": found.stable}
    for which in ("strongest", "weakest"):
        values[which] = number(linear_cka(x, alone(unimodal, dataset, test, str(options[which]))))
    return values | {"units": x.shape[1], "rows": len(x)}, {}


def _run(plan: Plan) -> Outcome:
    notes = [
        "The paper's ranks are of representations several times wider than ours, so that only directions compare. It prints "
        "two sets of them (MMVAE and GMC); ours stand beside those of MMVAE."
    ]
    return by_data(plan, _one, selection="last", notes=notes)


def _one(bench: Bench) -> Outcome:
    data, order = bench.data.name, list(bench.strengths())

    def changes(form: str, beta: int) -> dict[str, object]:
        reweight = {"reweight_modality": order[-1], "reweight": float(beta), "reweight_form": form}
        return reweight if beta else {}

    found = bench.measure(
        measure,
        lambda method, variant, seed: {
            "model": bench.training(method, seed, changes(*variant)),
            "unimodal": bench.training("vanilla", seed),
        },
        variants=list(product(_FORMS, BETAS)),
        options={"strongest": order[0], "weakest": order[-1], "tolerance": TOLERANCE},
    )
    tables, directions, drawings = [], [], {}
    for form, words in _FORMS.items():
        for name, label in {**_RANKS, **_CKA}.items():
            rows = []
            for m, title in bench.titles.items():
                paper = (
                    TABLE11["mmvae"][_PAPER[m]] if name == "numerical" and m != "ebr-robust" else [None] * len(BETAS)
                )
                series = [found.series(m, name, (form, beta)) for beta in BETAS]
                rows.append((title, [value(s, p) for s, p in zip(series, paper, strict=True)]))
            title = f"{label[0].upper()}{label[1:]} on {data}, {words}"
            columns = [f"β = {beta}" for beta in BETAS]
            tables.append(ResultTable(title, columns, rows, digits=3 if name in _CKA else 1, paper_digits=0))
            if name in ("effective", *_CKA):
                curves = {r: curve(dict(zip(BETAS, values, strict=True))) for r, values in rows}
                about = f"{label} of the fused representation on {data} for β = {list(BETAS)}, {words}."
                heading = f"{data}: fused representation ({form})"
                drawings[f"{name}-{form}"] = draw_curves(
                    heading, curves, "β, weight of the weakest modality", label, about
                )
        directions += _directions(bench, found, form)
    facts = {f"strongest and weakest on {data}": f"{order[0]}, {order[-1]}"}
    return Outcome(tables, directions, drawings, bench.notes(found), facts)


def _directions(bench: Bench, found: Found, form: str) -> list[Direction]:
    titles, where, numbers, high = bench.titles, f"({form}), {bench.data.name}", TABLE11["mmvae"], (form, BETAS[-1])
    result = []
    for name in ("numerical", "effective"):
        printed = name == "numerical"
        for m in METHODS:
            paper = numbers[_PAPER[m]]
            pair = found.series(m, name, high), found.series(m, name, (form, 0))
            claim = f"{name} rank of {titles[m]} falls from β = 0 to {BETAS[-1]} {where}"
            result.append(direction(claim, paper[-1] - paper[0], *pair, printed=printed))
        for a, b in (("kd", "vanilla"), ("ebr-paper", "vanilla"), ("ebr-paper", "kd"), ("ebr-robust", "vanilla")):
            gap = numbers[_PAPER[a]][-1] - numbers[_PAPER[b]][-1]
            pair = found.series(a, name, high), found.series(b, name, high)
            claim = f"{name} rank of {titles[a]} above {titles[b]} at β = {BETAS[-1]} {where}"
            result.append(direction(claim, gap, *pair, printed=printed))
    return result


FIGURE_5 = declare("fig5", _run)
