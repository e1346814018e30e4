"""Figure 4: what the encoder of the weakest modality fails to learn when it is trained through fusion alone."""

from __future__ import annotations

import numpy as np
import torch

from mmc_fast.diagnose.figures import Drawing, Reference, bars
from mmc_fast.diagnose.measures.probes import linear_probe, prefix_gap

from ..training import MultimodalModel
from .base import Direction, Experiment, Outcome, Plan, ResultTable
from .bench import METHODS, Bench, Series, by_source, direction, value
from .pieces import Measurement, Task, Values
from .representation import alone

__all__ = ["FIGURE_4", "measure"]


def measure(task: Task) -> tuple[Values, dict[str, np.ndarray]]:
    """Test accuracies of linear probes on the encoder of ``options["modality"]``, on the rows that have it.

    Trainings: "fused" (through fusion alone), "own" (also on the modality's own loss), "unimodal" (the modality alone).
    """
    dataset, name = task.dataset("fused"), str(task.options["modality"])
    column = dataset.modalities.index(name)
    train, test = (p.select(p.present[:, column]) for p in (dataset.part("train"), dataset.part("test")))

    @torch.no_grad()
    def features(model: MultimodalModel) -> tuple[torch.Tensor, torch.Tensor]:
        return model.encoders[column](train.features[column]), model.encoders[column](test.features[column])

    gap = prefix_gap(*features(task.run("fused").model), *features(task.run("own").model), train.labels, test.labels)
    unimodal = task.run("unimodal").unimodal
    single = linear_probe(
        alone(unimodal, dataset, train, name), train.labels, alone(unimodal, dataset, test, name), test.labels
    )
    values: Values = {"fused": gap.fused.accuracy, "own": gap.own.accuracy, "gap": gap.gap}
    return values | {"alone": single.accuracy, "chance": gap.fused.chance, "rows": gap.fused.rows}, {}


_COLUMNS = {"fused": "through fusion alone", "own": "also on its own loss", "gap": "gap", "alone": "unimodal model"}


def _run(plan: Plan) -> Outcome:
    return by_source(plan, FIGURE_4.sources(plan), _one, selection="last")


def _one(bench: Bench) -> Outcome:
    seeds, titles, data = bench.plan.seeds, bench.titles(), bench.source.name
    weakest = list(bench.strengths())[-1]
    own = {"reweight_modality": weakest, "reweight": 1.0, "reweight_form": "loss"}
    found = bench.measure(
        {
            (row, seed): Measurement(
                measure, row, data, seed,
                {
                    "fused": bench.training(row, seed),
                    "own": bench.training(row, seed, own),
                    "unimodal": bench.training("vanilla", seed),
                },
                {"modality": weakest},
            )
            for row in METHODS
            for seed in seeds
        }
    )  # fmt: skip
    series: dict[tuple[str, str], Series] = {
        (row, name): [found[row, s].values.get(name) for s in seeds] for row in METHODS for name in _COLUMNS
    }
    table = ResultTable(
        f"Figure 4 on {data}: test accuracy of a linear probe on the encoder of {weakest}, the weakest modality",
        list(_COLUMNS.values()),
        [(titles[row], [value(series[row, name]) for name in _COLUMNS]) for row in METHODS],
    )
    claim = f"{{}} leaves a smaller gap than vanilla in the encoder of {weakest}, {data}"
    directions: list[Direction] = [
        direction(
            f"fusion alone starves the encoder of {weakest} (gap above 0, vanilla), {data}", 1.0, series["vanilla", "gap"],
            printed=False,
        )
    ]  # fmt: skip
    for row in METHODS[1:]:
        pair = series[row, "gap"], series["vanilla", "gap"]
        directions.append(direction(claim.format(titles[row]), -1.0, *pair, printed=False))
    chance = next((m.values["chance"] for m in found.values() if m.diverged is None), None)
    return Outcome([table], directions, {"prefix-gap": _drawing(bench, series, weakest, chance)}, bench.notes(found))


def _drawing(bench: Bench, series: dict[tuple[str, str], Series], weakest: str, chance: float | None) -> Drawing:
    titles = bench.titles()
    whole = [row for row in METHODS if value(series[row, "fused"]).mean is not None]
    kinds = ("fused", "own", "alone")
    heights = {_COLUMNS[kind]: [value(series[row, kind]).mean or 0.0 for row in whole] for kind in kinds}
    errors = {_COLUMNS[kind]: [value(series[row, kind]).sd for row in whole] for kind in kinds}
    described = "; ".join(f"{name}: {', '.join(f'{v:.3f}' for v in values)}" for name, values in heights.items())
    return bars(
        f"{bench.source.name}: what the encoder of {weakest} learned",
        [titles[row] for row in whole],
        heights,
        y_label="accuracy of a linear probe",
        alt=f"Probe accuracy on {weakest} of {bench.source.name} for {', '.join(titles[r] for r in whole)}. {described}.",
        caption="Bars: mean over seeds, whiskers: s.d.",
        references=[] if chance is None else [Reference("largest class", chance)],
        errors=errors,
    )


FIGURE_4 = Experiment(
    "fig4",
    "What an encoder fails to learn through fusion",
    "Figure 4: the encoder of the eliminated modality, trained through fusion, stays behind the same encoder trained also "
    "on its own loss. The figure prints no numbers; that KD and EBR narrow the gap is what its argument implies.",
    (
        "By default mfeat (digits) in place of the paper's data; the eliminated modality is the weakest by unimodal validation score.",
        "Its own loss is the cross-entropy of a linear classifier on the encoder, with weight 1 beside the fused loss; same "
        "seed and start for both. A logistic regression on the train part judges both encoders on the test part.",
    ),
    ("mfeat",),
    _run,
)
