"""Table 9: would a classifier that knows unimodal neurons be in doubt about the modality of the fused ones?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

from mmc_fast.agop.head import linear_chain
from mmc_fast.diagnose.adapter import flat
from mmc_fast.diagnose.measures.polysemanticity import cross_modal_polysemanticity
from mmc_fast.diagnose.measures.similarity import covariance_of
from mmc_fast.diagnose.measures.weights import modality_entropy, neuron_modality_shares

from ..jobs import Values, Workspace
from ..training.adapter import RunAdapter
from .base import Direction, Outcome, Plan, ResultTable, declare
from .inside import Bench, Models, by_data, direction, number, value
from .paper import TABLE9

_PAPER = {"vanilla": "vanilla", "kd": "kd", "ebr-paper": "ebr", "ebr-robust": "ebr"}
_COLUMNS = {
    "cross_entropy": "cross-entropy (nats)",
    "entropy": "entropy / ln m",
    "mixing": "entropy of weight shares / ln m",
    "accuracy": "accuracy of the classifier",
}


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Cross-entropy, entropy over ln m and accuracy of the weight classifier, and the label-free mixing of neurons.

    Trainings: "model", and "unimodal" (whose unimodal models give the rows that the classifier learns from).
    """
    models = Models(settings, workspace)
    model = models.run("model").model
    adapter = RunAdapter(model)
    chain = linear_chain(adapter.head)
    if chain is None:
        reason = "the fusion has no Linear layer over the modalities side by side"
        return dict.fromkeys(_COLUMNS) | {"not_applicable": reason}, {}
    weight = cast(torch.Tensor, chain[0].weight).detach()
    blocks = dict(zip(model.modalities, model.widths, strict=True))
    unimodal, rows = models.run("unimodal").unimodal, None
    if unimodal is not None:
        rows = {n: cast(torch.Tensor, u.classifier[0].weight).detach() for n, u in unimodal.models.items()}
    found = cross_modal_polysemanticity(weight, blocks, rows, seed=models.seed)
    received = flat(adapter.encode(models.data("model").part("test")))
    shares = neuron_modality_shares(weight, blocks, covariance_of(received))
    return {
        "cross_entropy": found.cross_entropy,
        "entropy": found.entropy,
        "accuracy": found.accuracy,
        "mixing": number(float(modality_entropy(shares).nanmean())),
        "not_applicable": found.not_applicable,
    }, {}


def _run(plan: Plan) -> Outcome:
    notes = [
        "The paper's cross-entropies for vanilla and KD are above ln 2 = 0.69, the value of a classifier that knows nothing "
        "of two modalities; a confident classifier that is wrong exceeds any bound.",
        "Where the accuracy of the classifier on held-out unimodal rows is near 1/m it cannot tell modalities, and its two "
        "other numbers mean little; the entropy of weight shares needs no classifier.",
    ]
    return by_data(plan, _one, selection="last", notes=notes)


def _one(bench: Bench) -> Outcome:
    titles, data = bench.titles, bench.data.name
    found = bench.measure(
        measure,
        lambda method, _, seed: {"model": bench.training(method, seed), "unimodal": bench.training("vanilla", seed)},
    )
    rows, notes = [], bench.notes(found)
    for m, title in titles.items():
        paper = None if m == "ebr-robust" else TABLE9[_PAPER[m]]
        values = [value(found.series(m, name), paper if name == "cross_entropy" else None) for name in _COLUMNS]
        rows.append((title, values))
        reasons = {r.values.get("not_applicable") for r in found.of(m)} - {None}
        notes += [f"{title} on {data}: the weight classifier is not applicable: {reason}." for reason in reasons]
    title = f"Table 9 on {data}: cross-modal polysemanticity of the fusion's first layer"
    table = ResultTable(title, list(_COLUMNS.values()), rows, paper_digits=2)
    directions: list[Direction] = []
    for first, second in (("kd", "vanilla"), ("ebr-paper", "vanilla"), ("ebr-paper", "kd"), ("ebr-robust", "vanilla")):
        paper = round(TABLE9[_PAPER[first]] - TABLE9[_PAPER[second]], 2)
        for name, words in (("cross_entropy", "cross-entropy"), ("mixing", "entropy of weight shares")):
            claim = f"{words} of {titles[first]} below {titles[second]}, {data}"
            pair = found.series(first, name), found.series(second, name)
            directions.append(direction(claim, paper, *pair, printed=name == "cross_entropy"))
    return Outcome([table], directions, {}, notes, {f"modalities of {data}": str(len(bench.modalities))})


TABLE_9 = declare("table9", _run)
