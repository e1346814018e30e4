"""Table 9: would a classifier that knows unimodal neurons be in doubt about the modality of the fused ones?"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch

from mmc_fast.diagnose.adapter import chain_of, flat
from mmc_fast.diagnose.measures.polysemanticity import cross_modal_polysemanticity
from mmc_fast.diagnose.measures.similarity import covariance_of
from mmc_fast.diagnose.measures.weights import modality_entropy, neuron_modality_shares

from ..training.adapter import RunAdapter
from .base import Direction, Experiment, Outcome, Plan, ResultTable
from .bench import METHODS, Bench, by_source, direction, value
from .paper import TABLE9
from .pieces import Measurement, Task, Values
from .representation import number

__all__ = ["TABLE_9", "measure"]


def measure(task: Task) -> tuple[Values, dict[str, np.ndarray]]:
    """Cross-entropy, entropy over ln m and accuracy of the weight classifier, and the label-free mixing of neurons.

    Trainings: "model", and "unimodal" (whose unimodal models give the rows that the classifier learns from).
    """
    model = task.run("model").model
    adapter = RunAdapter(model)
    chain = chain_of(adapter.head)
    none: Values = dict.fromkeys(("cross_entropy", "entropy", "accuracy", "mixing"))
    if chain is None:
        return none | {"not_applicable": "the fusion has no Linear layer over the modalities side by side"}, {}
    weight = cast(torch.Tensor, chain[0].weight).detach()
    blocks = dict(zip(model.modalities, model.widths, strict=True))
    unimodal = task.run("unimodal").unimodal
    rows = (
        None
        if unimodal is None
        else {n: cast(torch.Tensor, u.classifier[0].weight).detach() for n, u in unimodal.models.items()}
    )
    found = cross_modal_polysemanticity(weight, blocks, rows, seed=task.seed)
    received = flat(adapter.encode(task.dataset("model").part("test")))
    shares = neuron_modality_shares(weight, blocks, covariance_of(received))
    return {
        "cross_entropy": found.cross_entropy,
        "entropy": found.entropy,
        "accuracy": found.accuracy,
        "mixing": number(float(modality_entropy(shares).nanmean())),
        "not_applicable": found.not_applicable,
    }, {}


_KEYS = {"vanilla": "vanilla", "kd": "kd", "ebr-paper": "ebr"}
_COLUMNS = {
    "cross_entropy": "cross-entropy (nats)",
    "entropy": "entropy / ln m",
    "mixing": "entropy of weight shares / ln m",
    "accuracy": "accuracy of the classifier",
}


def _run(plan: Plan) -> Outcome:
    notes = [
        "The paper's cross-entropies for vanilla and KD are above ln 2 = 0.69, the value of a classifier that knows nothing "
        "of two modalities; a confident classifier that is wrong exceeds any bound.",
        "Where the accuracy of the classifier on held-out unimodal rows is near 1/m it cannot tell modalities, and its two "
        "other numbers mean little; the entropy of weight shares needs no classifier.",
    ]
    return by_source(plan, TABLE_9.sources(plan), _one, selection="last", notes=notes)


def _one(bench: Bench) -> Outcome:
    seeds, titles, data = bench.plan.seeds, bench.titles(), bench.source.name
    found = bench.measure(
        {
            (row, seed): Measurement(
                measure, row, data, seed,
                {"model": bench.training(row, seed), "unimodal": bench.training("vanilla", seed)},
            )
            for row in METHODS
            for seed in seeds
        }
    )  # fmt: skip
    series = {(row, name): [found[row, s].values.get(name) for s in seeds] for row in METHODS for name in _COLUMNS}
    rows, notes = [], bench.notes(found)
    for row in METHODS:
        paper = TABLE9.get(_KEYS.get(row, ""))
        values = [value(series[row, name], paper if name == "cross_entropy" else None) for name in _COLUMNS]
        rows.append((titles[row], values))
        reasons = {found[row, s].values.get("not_applicable") for s in seeds} - {None}
        notes += [f"{titles[row]} on {data}: the weight classifier is not applicable: {reason}." for reason in reasons]
    table = ResultTable(
        f"Table 9 on {data}: cross-modal polysemanticity of the fusion's first layer", list(_COLUMNS.values()), rows,
        paper_digits=2,
    )  # fmt: skip
    directions: list[Direction] = []
    for first, second in (("kd", "vanilla"), ("ebr-paper", "vanilla"), ("ebr-paper", "kd"), ("ebr-robust", "vanilla")):
        paper = round(TABLE9[_KEYS.get(first, "ebr")] - TABLE9[_KEYS[second]], 2)
        for name, words in (("cross_entropy", "cross-entropy"), ("mixing", "entropy of weight shares")):
            claim = f"{words} of {titles[first]} below {titles[second]}, {data}"
            pair = series[first, name], series[second, name]
            directions.append(direction(claim, paper, *pair, printed=name == "cross_entropy"))
    return Outcome([table], directions, {}, notes, {f"modalities of {data}": str(len(bench.modalities))})


TABLE_9 = Experiment(
    "table9",
    "Neurons that serve several modalities",
    "Table 9: a classifier that knows the weights of unimodal models has a cross-entropy of 5.66 on the fused weights of "
    "vanilla, 2.09 with KD and 0.59 with EBR.",
    (
        "By default mfeat (digits) in place of the paper's data.",
        "Rows of the fusion's first layer enter as the sum of their blocks after one random projection to a shared width; the "
        "target is the modality with the largest block, since a fused row has no label of its own.",
        "The classifier learns from the first layers behind the encoders of the unimodal models of the same seed, one "
        "classifier for all methods.",
    ),
    ("mfeat",),
    _run,
)
