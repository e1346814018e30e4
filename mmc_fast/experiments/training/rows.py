"""A finished model on rows whose labels nobody knows: answers, and how far the rows are from the training data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

from ..data import MultimodalDataset, load
from ..data.preprocessing import Preprocessing
from ..tasks import Task
from .evaluate import check_fits, predict
from .model import MultimodalModel


@dataclass
class RowPredictions:
    """Answers ``[N, A]`` of the task (class probabilities, predicted numbers) in the order of the rows.

    ``present`` bool ``[N, m]``: what each row has; a row with nothing gets the answer that is best for all training rows alike.
    ``differences``: modalities, columns and categories that are new or missing; ``shift``: for each column what
    :func:`mmc_fast.experiments.data.preprocessing.shift` says. Both are empty for a data set made from tensors.
    """

    answers: Tensor
    task: Task
    rows: list[str] | None
    present: Tensor
    modalities: list[str]
    differences: dict[str, Any] = field(default_factory=dict)
    shift: list[dict[str, Any]] = field(default_factory=list)

    def table(self) -> Any:
        """A pandas table: ``id`` (or ``row``), the columns of the task, ``modalities`` (those present)."""
        pandas = require("pandas", extra="experiments")
        first = {"row": range(len(self.present))} if self.rows is None else {"id": self.rows}
        columns: dict[str, Any] = {**first, **self.task.columns(self.answers)}
        here = [[m for m, there in zip(self.modalities, row, strict=True) if there] for row in self.present.tolist()]
        return pandas.DataFrame(columns | {"modalities": ["+".join(names) for names in here]})

    def report(self) -> list[str]:
        """What a user should know before trusting the predictions, as lines of text; empty where there is nothing."""
        empty = int((~self.present.any(1)).sum())
        told = [f"{empty} row(s) have no modality and get {self.task.prior_text}"] if empty else []
        return shift_lines({"differences": self.differences, "shift": self.shift}) + told


def shift_lines(info: Mapping[str, Any]) -> list[str]:
    """The entries "differences" and "shift" of ``info`` as lines of text, the largest shifts first."""
    d, shift, lines = info.get("differences", {}), info.get("shift", []), []
    for key, text in (
        ("absent_modalities", "modalities that no row has"),
        ("new_modalities", "modalities that the model does not know, not used"),
    ):
        if d.get(key):
            lines.append(f"{text}: {', '.join(d[key])}")
    for key, text in (
        ("missing_columns", "columns that are not there, taken as not measured"),
        ("new_columns", "columns that the model does not know, not used"),
        ("unknown_categories", "values that are no category of training, taken as 'other'"),
    ):
        for view, names in d.get(key, {}).items():
            more = f" and {len(names) - 8} more" if len(names) > 8 else ""
            lines.append(f"{view}: {text}: {', '.join(names[:8])}{more}")
    far = [entry for entry in shift if entry["far"]]
    far.sort(key=lambda e: (-e["outside"], -abs(e["difference"] or 0.0)))
    if far:
        lines.append(f"{len(far)} of {len(shift)} columns are far from the training data, the farthest first:")
    for e in far[:10]:
        gap = "" if e["difference"] is None else f", mean {e['difference']:+.2f} training s.d. away"
        lines.append(f"  {e['modality']} {e['column']}: {e['outside']:.0%} outside of the training range{gap}")
    return lines


def predict_rows(
    model: MultimodalModel, preprocessing: Preprocessing | None, name: str, data: Any, options: Mapping[str, Any]
) -> RowPredictions:
    """What :meth:`LoadedRun.predict` gives; ``name``: of the data of the run."""
    if isinstance(data, MultimodalDataset):
        dataset = data
    elif preprocessing is None:
        raise InputError(
            f"the run on {name} holds no preprocessing, since its data were made from tensors; give a MultimodalDataset "
            "whose features are made in the same way"
        )
    else:
        dataset = load(data, preprocessing=preprocessing, purpose="prediction", **options)
    check_fits(model, dataset)
    answers = predict(model, list(dataset.features.values()), dataset.present, on_empty="prior")
    if not bool(torch.isfinite(answers).all()):
        row = int((~torch.isfinite(answers).all(1)).nonzero()[0])
        raise InputError(f"{dataset.name}: the prediction of row {row} is not finite; its values are too large")
    info = dataset.info
    return RowPredictions(
        answers,
        model.task,
        dataset.row_names,
        dataset.present,
        dataset.modalities,
        info.get("differences", {}),
        info.get("shift", []),
    )
