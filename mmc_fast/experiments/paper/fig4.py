"""Figure 4: what the encoder of the weakest modality fails to learn when it is trained through fusion alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from mmc_fast.diagnose.figures import Drawing, Reference
from mmc_fast.diagnose.measures.probes import linear_probe, prefix_gap

from ..jobs import Values, Workspace
from ..training import MultimodalModel
from .base import Outcome, Plan, ResultTable, declare
from .inside import METHODS, Bench, Found, Models, alone, by_data, direction, draw_bars, value

_COLUMNS = {"fused": "through fusion alone", "own": "also on its own loss", "gap": "gap", "alone": "unimodal model"}


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Test accuracies of linear probes on the encoder of ``options["modality"]``, on the samples that have it.

    Trainings: "fused" (through fusion alone), "own" (also on the modality's own loss), "unimodal" (the modality alone).
    """
    models = Models(settings, workspace)
    dataset, name = models.data("fused"), str(models.options["modality"])
    column = dataset.modalities.index(name)
    train, test = (p.select(p.present[:, column]) for p in (dataset.part("train"), dataset.part("test")))

    @torch.no_grad()
    def features(model: MultimodalModel) -> tuple[torch.Tensor, torch.Tensor]:
        return model.encoders[column](train.features[column]), model.encoders[column](test.features[column])

    fused, own = features(models.run("fused").model), features(models.run("own").model)
    gap = prefix_gap(*fused, *own, train.labels, test.labels)
    unimodal = models.run("unimodal").unimodal
    single = linear_probe(
        alone(unimodal, dataset, train, name), train.labels, alone(unimodal, dataset, test, name), test.labels
    )
    values: Values = {"fused": gap.fused.accuracy, "own": gap.own.accuracy, "gap": gap.gap}
    return values | {"alone": single.accuracy, "chance": gap.fused.chance, "rows": gap.fused.rows}, {}


def _run(plan: Plan) -> Outcome:
    return by_data(plan, _one, selection="last")


def _one(bench: Bench) -> Outcome:
    data, weakest = bench.data.name, list(bench.strengths())[-1]
    own = {"reweight_modality": weakest, "reweight": 1.0, "reweight_form": "loss"}
    found = bench.measure(
        measure,
        lambda method, _, seed: {
            "fused": bench.training(method, seed),
            "own": bench.training(method, seed, own),
            "unimodal": bench.training("vanilla", seed),
        },
        options={"modality": weakest},
    )
    table = ResultTable(
        f"Figure 4 on {data}: test accuracy of a linear probe on the encoder of {weakest}, the weakest modality",
        list(_COLUMNS.values()),
        [(title, [value(found.series(m, name)) for name in _COLUMNS]) for m, title in bench.titles.items()],
    )
    vanilla = found.series("vanilla", "gap")
    claim = f"fusion alone starves the encoder of {weakest} (gap above 0, vanilla), {data}"
    directions = [direction(claim, 1.0, vanilla, printed=False)]
    for m in METHODS[1:]:
        claim = f"{bench.titles[m]} leaves a smaller gap than vanilla in the encoder of {weakest}, {data}"
        directions.append(direction(claim, -1.0, found.series(m, "gap"), vanilla, printed=False))
    return Outcome([table], directions, {"prefix-gap": _draw(bench, found, weakest)}, bench.notes(found))


def _draw(bench: Bench, found: Found, weakest: str) -> Drawing:
    whole = [m for m in METHODS if value(found.series(m, "fused")).mean is not None]
    series = {_COLUMNS[kind]: [value(found.series(m, kind)) for m in whole] for kind in ("fused", "own", "alone")}
    chance = next((r.values["chance"] for r in found.results.values() if not r.failed), None)
    titles = [bench.titles[m] for m in whole]
    return draw_bars(
        f"{bench.data.name}: what the encoder of {weakest} learned",
        titles,
        series,
        "accuracy of a linear probe",
        f"Probe accuracy on {weakest} of {bench.data.name} for {', '.join(titles)}.",
        references=[] if chance is None else [Reference("largest class", chance)],
    )


FIGURE_4 = declare("fig4", _run)
