"""Table 7: redundancy of the fused representation as modalities are added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from mmc_fast.agop.head import linear_chain
from mmc_fast.diagnose.measures.similarity import covariance_of, variance_inflation

from ..data import Part
from ..jobs import Values, Workspace
from ..training import MultimodalModel
from ..training.adapter import RunAdapter
from .base import Direction, Outcome, Plan, ResultTable, declare
from .inside import METHODS, Bench, Found, Models, by_data, curve, direction, draw_curves, fused, number, value
from .paper import TABLE7

RIDGE = 1e-6


@torch.no_grad()
def contributions(model: MultimodalModel, part: Part) -> torch.Tensor | None:
    """What each modality brings to the fusion's first layer as one number per row: ``[N, m]``.

    The first principal component of ``W_i z_i``, with ``W_i`` the modality's block of the layer and ``z_i`` what the fusion
    receives of it. None where the fusion has no Linear layer over the modalities side by side.
    """
    adapter = RunAdapter(model)
    chain = linear_chain(adapter.head)
    if chain is None:
        return None
    blocks = cast(torch.Tensor, chain[0].weight).double().split(model.widths, 1)
    found = []
    for weight, z in zip(blocks, adapter.encode(part).values(), strict=True):
        x = z.double() @ weight.t()
        left, sizes, _ = torch.linalg.svd(x - x.mean(0), full_matrices=False)
        found.append(left[:, 0] * sizes[0])
    return torch.stack(found, 1)


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Mean variance inflation on the test part: of the units of the fused representation, and of :func:`contributions`."""
    models = Models(settings, workspace)
    model, part, ridge = models.run("model").model, models.data("model").part("test"), float(models.options["ridge"])
    x, one_each = fused(model, part), contributions(model, part)
    factors = variance_inflation(covariance_of(x), ridge)
    values: Values = {"units": number(float(factors.nanmean())), "modalities": None, "width": len(factors)}
    if one_each is not None:
        values["modalities"] = number(float(variance_inflation(covariance_of(one_each), ridge).nanmean()))
    return values | {"constant": int(factors.isnan().sum()), "rows": len(x)}, {}


_COUNTS = (2, 3, 4, 5)
_READINGS = {"units": "the units of the fused representation", "modalities": "what each modality brings to the fusion"}
_PAPER = {"vanilla": "vanilla", "kd": "kd", "ebr-paper": "ebr", "ebr-robust": "ebr"}


def _run(plan: Plan) -> Outcome:
    return by_data(plan, _one, selection="last")


def _one(bench: Bench) -> Outcome:
    data, strengths = bench.data.name, bench.strengths()
    order = list(strengths)
    counts = [m for m in _COUNTS if m <= len(order)]
    found = bench.measure(
        measure,
        lambda method, m, seed: {"model": bench.training(method, seed, modalities=order[:m])},
        variants=counts,
        options={"ridge": RIDGE},
    )
    tables, directions, drawings = [], [], {}
    for name, words in _READINGS.items():
        rows = []
        for method, title in bench.titles.items():
            paper = {m: None if method == "ebr-robust" else TABLE7[_PAPER[method]][_COUNTS.index(m)] for m in counts}
            rows.append((title, [value(found.series(method, name, m), paper[m]) for m in counts]))
        title = f"Table 7 on {data}: mean variance inflation of {words}, by number of modalities"
        tables.append(ResultTable(title, [f"m = {m}" for m in counts], rows, digits=2, paper_digits=2))
        directions += _directions(bench, found, name, counts)
        curves = {title: curve(dict(zip(counts, values, strict=True))) for title, values in rows}
        about = f"Mean variance inflation of {words} on {data} for {counts} modalities."
        heading = f"{data}: VIF of {words}"
        drawings[f"vif-{name}"] = draw_curves(heading, curves, "number of modalities", "mean VIF", about)
    strongest = ", ".join(f"{name} ({score:.3f})" for name, score in strengths.items())
    facts = {f"order of the modalities on {data}": f"{strongest}, by unimodal validation score"}
    return Outcome(tables, directions, drawings, bench.notes(found), facts)


def _directions(bench: Bench, found: Found, name: str, counts: list[int]) -> list[Direction]:
    def paper(method: str, m: int) -> float:
        return TABLE7[_PAPER[method]][_COUNTS.index(m)]

    titles, where, result = bench.titles, f"VIF of {_READINGS[name]}, {bench.data.name}", []
    low, high = counts[0], counts[-1]
    pairs = [(method, "vanilla", m) for m in counts for method in METHODS[1:]] + [("ebr-paper", "kd", high)]
    for first, second, m in pairs:
        claim = f"{titles[first]} below {titles[second]} at m = {m}: {where}"
        series = found.series(first, name, m), found.series(second, name, m)
        result.append(direction(claim, round(paper(first, m) - paper(second, m), 2), *series))
    for method in METHODS if high > low else ():
        claim = f"{titles[method]} grows from m = {low} to m = {high}: {where}"
        series = found.series(method, name, high), found.series(method, name, low)
        result.append(direction(claim, round(paper(method, high) - paper(method, low), 2), *series))
    return result


TABLE_7 = declare("table7", _run)
