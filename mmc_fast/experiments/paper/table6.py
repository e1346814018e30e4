"""Table 6: what can stand in for a modality that is missing at test time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.seeds import generator
from mmc_fast.diagnose.adapter import flat
from mmc_fast.diagnose.figures import Drawing
from mmc_fast.diagnose.statistics import ResampledScores, average

from ..data import Part
from ..jobs import Job, Values, Workspace
from ..report.drawings import metric_name
from ..training import MultimodalModel, predict
from ..training.adapter import RunAdapter
from .base import Direction, Outcome, Plan, ResultTable, Value, declare
from .inside import Bench, Models, by_data, draw_bars, estimate, resampled
from .paper import TABLE6

FILLED = ("zeros", "random", "nearest neighbour", "mean without class", "mean with class", "mean of the true class")
"""Rules that fill the place of a missing modality in a vanilla model; the last one reads the label of the test row."""
MODELS = ("late", "ebr-paper", "ebr-robust")
"""Method configs that bring their own rule."""
_ROWS = 512  # test rows at a time whose neighbours are looked for


def hide(present: Tensor, column: int) -> Tensor:
    """Presence bool ``[N, m]`` without one modality, except in rows that have nothing else."""
    hidden = present.clone()
    hidden[:, column] = False
    return torch.where(hidden.any(1, keepdim=True), hidden, present)


@torch.no_grad()
def fillings(model: MultimodalModel, train: Part, test: Part, column: int, seed: int) -> dict[str, Tensor]:
    """Class probabilities ``[N, C]`` of a model without heads on ``test``, by rule for the features of one modality.

    The features that the fusion receives are replaced in all rows that have the modality and another one:

    - zeros: by 0. random: by that of a train row drawn at random. mean without class: by the mean over train rows.
    - nearest neighbour: by that of the train row whose other features are nearest (Euclidean, every column in units of its
      standard deviation over the train rows).
    - mean with class: by ``Σ_c p_c μ_c`` with the class means over train rows and the model's own class probabilities p
      with the plain mean in their place; no label is read. mean of the true class: by ``μ_y``.

    Only train rows that have the modality are used.
    """
    adapter = RunAdapter(model)
    known = train.select(train.present[:, column])
    donors = adapter.encode(known)
    received = adapter.encode(test)
    name = model.modalities[column]
    hidden = hide(test.present, column)
    gone = ~hidden[:, column, None]  # also where the data lack it, which the fusion does not read
    theirs = donors[name]

    def answer(filling: Tensor) -> Tensor:
        return torch.softmax(adapter.fuse(received | {name: torch.where(gone, filling, received[name])}), -1)

    mean = theirs.mean(0)
    classes = model.num_classes
    by_class = torch.stack(
        [theirs[known.labels == c].mean(0) if bool((known.labels == c).any()) else mean for c in range(classes)]
    )
    drawn = torch.randint(len(theirs), (len(test),), generator=generator(seed, "substitution", name))
    plain = answer(mean)
    nearest = _nearest({n: x for n, x in received.items() if n != name}, {n: donors[n] for n in donors if n != name})
    return {
        "zeros": answer(torch.zeros_like(mean)),
        "random": answer(theirs[drawn]),
        "nearest neighbour": answer(theirs[nearest]),
        "mean without class": plain,
        "mean with class": answer(plain @ by_class),
        "mean of the true class": answer(by_class[test.labels]),
    }


def _nearest(rows: Mapping[str, Tensor], donors: Mapping[str, Tensor]) -> Tensor:
    """For each row ``[N, d]`` the position of the nearest donor."""
    x, y = flat(rows), flat(donors)
    spread = y.std(0)
    moving = spread > 0
    x, y = x[:, moving] / spread[moving], y[:, moving] / spread[moving]
    return torch.cat([torch.cdist(piece, y).argmin(1) for piece in x.split(_ROWS)])


def measure(settings: Mapping[str, Any], workspace: Workspace) -> tuple[Values, dict[str, np.ndarray]]:
    """Class probabilities ``rule/modality`` on the test part with that modality hidden, and ``complete/method``.

    Trainings: "vanilla", those of :data:`MODELS`, and "target/MODALITY", trained without that modality.
    """
    models = Models(settings, workspace)
    vanilla, dataset = models.run("vanilla").model, models.data("vanilla")
    train, test = dataset.part("train"), dataset.part("test")
    others = {name: models.run(name).model for name in MODELS}
    arrays = {"labels": test.labels.numpy()}
    for name, model in {"vanilla": vanilla, **others}.items():
        arrays[f"complete/{name}"] = predict(model, test.features, test.present, on_empty="prior").numpy()
    for column, name in enumerate(dataset.modalities):
        found = fillings(vanilla, train, test, column, models.seed)
        hidden = hide(test.present, column)
        for rule, model in others.items():
            found[rule] = predict(model, test.features, hidden, on_empty="prior")
        without, target = models.data(f"target/{name}").part("test"), models.run(f"target/{name}").model
        found["target"] = predict(target, without.features, without.present, on_empty="prior")
        # A row that has nothing else keeps the modality, which the target never sees.
        kept = test.present[:, column] & hidden[:, column]
        found["target"][kept] = found["zeros"][kept]
        arrays |= {f"{rule}/{name}": p.numpy() for rule, p in found.items()}
    return {"modalities": dataset.modalities, "metric": dataset.metric}, arrays


_LABELS = {rule: rule for rule in FILLED} | {
    "mean with class": "mean with class (of the predicted classes)",
    "mean of the true class": "mean of the true class (reads the label)",
    "late": "late fusion",
    "ebr-paper": "EBR (paper), its own rule",
    "ebr-robust": "EBR robust, its own rule",
    "target": "target: trained without it",
}
_PAPER = {rule: rule for rule in (*FILLED, "target") if rule in TABLE6} | {"late": "late fusion", "ebr-paper": "ebr"}
"""Rule -> its key among the paper's numbers, where it has one."""
Scores = Mapping[str, ResampledScores | None]


def _run(plan: Plan) -> Outcome:
    note = (
        "The paper does not say whose class the mean with class is; ours weighs class means by the model's own "
        "predictions, and the mean of the true class is shown as what reading the label would give."
    )
    return by_data(plan, _one, methods=("vanilla", *MODELS), notes=[note])


def _one(bench: Bench) -> Outcome:
    def trainings(_: str, __: Any, seed: int) -> dict[str, Job]:
        jobs = {name: bench.training(name, seed) for name in ("vanilla", *MODELS)}
        for name in bench.modalities:
            others = [other for other in bench.modalities if other != name]
            jobs[f"target/{name}"] = bench.training("vanilla", seed, {"unimodal_share": 0.0}, others)
        return jobs

    found = bench.measure(measure, trainings, methods=("substitution",))
    results = found.of("substitution")
    scores = {rule: {n: resampled(bench.metric, results, f"{rule}/{n}") for n in bench.modalities} for rule in _LABELS}
    means = {rule: _average(list(by_name.values())) for rule, by_name in scores.items()}
    rows = []
    for rule, label in _LABELS.items():
        paper = TABLE6[_PAPER[rule]] if rule in _PAPER else None
        rows.append((label, [*(_value(s) for s in scores[rule].values()), _value(means[rule], paper)]))
    for name, title in bench.titles.items():
        whole = resampled(bench.metric, results, f"complete/{name}")
        rows.append((f"nothing missing: {title}", [*(Value() for _ in bench.modalities), _value(whole)]))
    title = (
        f"Table 6 on {bench.data.name}: test {metric_name(bench.metric)} with one modality missing in every row (the "
        "paper: AUC (ROC) on MIMIC-IV)"
    )
    table = ResultTable(title, [*(f"without {name}" for name in bench.modalities), "mean"], rows)
    drawings = {} if found.failed else {"substitution": _draw(bench, scores)}
    return Outcome([table], _directions(bench.data.name, means), drawings, bench.notes(found))


def _average(scores: Sequence[ResampledScores | None]) -> ResampledScores | None:
    known = [s for s in scores if s is not None]
    return average(known) if known and len(known) == len(scores) else None


def _value(scores: ResampledScores | None, paper: float | None = None) -> Value:
    return Value(paper=paper) if scores is None else Value.over(list(scores.plain), paper)


def _directions(data: str, means: Scores) -> list[Direction]:
    result = []
    for method, title in (("ebr-paper", "EBR (paper)"), ("ebr-robust", "EBR robust")):
        for rule, key in _PAPER.items():
            if key != "ebr":
                mine, other = means[method], means[rule]
                ours = estimate(None if mine is None or other is None else mine - other)
                paper = round(TABLE6["ebr"] - TABLE6[key], 4)
                words = "above" if paper > 0 else "below"
                result.append(Direction(f"substitution by {title} {words} {_LABELS[rule]}, {data}", paper, ours))
    return result


def _draw(bench: Bench, scores: Mapping[str, Scores]) -> Drawing:
    shown = ("zeros", "nearest neighbour", "mean with class", "late", "ebr-paper", "ebr-robust", "target")
    series = {_LABELS[rule]: [_value(s) for s in scores[rule].values()] for rule in shown}
    lowest = min(v.mean or 0.0 for values in series.values() for v in values)
    about = (
        f"Test score on {bench.data.name} without {', '.join(bench.modalities)} in turn; the axis does not start at 0."
    )
    heading, y_label = f"{bench.data.name}: one modality missing", metric_name(bench.metric)
    return draw_bars(heading, bench.modalities, series, y_label, about, y_limits=(lowest * 0.95, None))


TABLE_6 = declare("table6", _run)
