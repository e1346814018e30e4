"""What a model is asked for: classes, several labels, numbers; how labels are read, and which score is the default."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmc_fast._util.names import unknown
from mmc_fast.errors import InputError

from .adapter import Adapter
from .measures.retrieval import recalled
from .statistics import weighted_scores

METRICS = {
    "accuracy": "classes", "auroc": "classes", "f1": "labels", "macro_auroc": "labels", "r2": "numbers", "concordance": "survival"
} | dict.fromkeys(("recall@1", "recall@5", "recall@10"), "pairs")  # fmt: skip
"""Score -> the kind of task that has it."""
BOUNDED = tuple(name for name in METRICS if name != "r2")
"""Scores between 0 and 1."""
RANKED = ("auroc", "macro_auroc", "concordance")
"""Scores of the order of outputs; one half without knowledge."""

Metric = str | Callable[[Tensor, Tensor], float]


def metric_name(metric: Metric | None) -> str | None:
    """The name of a score, that of the function where it is one, marked where it is that of a score here."""
    if not callable(metric):
        return metric
    name = getattr(metric, "__name__", type(metric).__name__)
    return f"own {name}" if name in METRICS else name


@dataclass(frozen=True)
class Task:
    """Labels of one kind and the score of outputs ``[N, C]`` against them; larger scores are better.

    kind: "classes" (int64 ``[N]``), "labels" (several 0/1 labels ``[N, C]``), "numbers" (float ``[N, C]``, a regression),
    "survival" (``[N, 2]``: time, and 1 for an event or 0 for the end of observation; outputs are a risk ``[N, 1]``),
    "pairs" (two towers whose embeddings are the outputs side by side; of labels only their number counts).
    metric: "accuracy"; "auroc" (two classes; also a pair's similarity ``[N, 1]`` of two towers, label 1 where it matches);
    "f1" (micro-averaged over labels, positive above 0); "macro_auroc" (mean over labels); "concordance" (Harrell's C); "r2" (mean
    over outputs of ``1 − Σ(y − ŷ)² / Σ(y − ȳ)²``); "recall@1", "recall@5", "recall@10" (of the other tower's sample,
    :func:`~mmc_fast.diagnose.measures.retrieval.recalled`); or the name of ``score``, a function ``(outputs, labels) -> float``.
    """

    kind: str
    metric: str
    outputs: int
    score: Callable[[Tensor, Tensor], float] | None = None

    @classmethod
    def of(cls, adapter: Adapter, batch: Any, outputs: int, metric: Metric | None) -> Task | None:
        """The task of the labels of a first batch; None where it has none."""
        found = _given(adapter, batch)
        if found is None:
            return None
        if isinstance(metric, str) and METRICS[metric] == "pairs":
            return cls("pairs", metric, outputs, lambda y, _: float(recalled(y, int(metric.split("@")[1])).mean()))
        labels = _tensor(found, adapter)
        kind = METRICS[metric] if isinstance(metric, str) else _kind(labels, outputs)
        if kind == "classes" and metric == "auroc" and outputs > 2:
            raise InputError(
                f"diagnose: metric 'auroc' is for 2 classes and there are {outputs} outputs; use 'accuracy'"
            )
        usual = {
            "classes": "auroc" if outputs <= 2 else "accuracy",
            "labels": "f1",
            "numbers": "r2",
            "survival": "concordance",
        }[kind]
        name = metric_name(metric) or usual
        return cls(kind, name, outputs, _guarded(metric, name) if callable(metric) else None)

    def labels(self, adapter: Adapter, batch: Any) -> Tensor | None:
        """Labels of a batch as this task has them, on the CPU; None where there are none."""
        found = _given(adapter, batch)
        if found is None:
            return None
        if self.kind == "pairs":
            return torch.zeros(len(found), 1)
        y = _tensor(found, adapter)
        if self.kind == "survival":
            if y.dim() != 2 or y.shape[1] != 2 or self.outputs != 1 or not bool(y.isfinite().all()):
                raise InputError(
                    f"diagnose: labels of survival are {list(y.shape)} for {self.outputs} outputs; give time and event "
                    "[samples, 2], and one risk a sample as output"
                )
            return y.double()
        if self.kind == "numbers":
            y = y.float().reshape(len(y), -1)
            if y.shape[1] != self.outputs or not bool(y.isfinite().all()):
                raise InputError(
                    f"diagnose: labels of a regression are {list(y.shape)} for {self.outputs} outputs; give finite numbers "
                    "[samples, outputs]"
                )
            return y
        if self.kind == "labels":
            if y.dim() != 2 or y.shape[1] != self.outputs or not _binary(y):
                raise InputError(
                    f"diagnose: several labels are {list(y.shape)} for {self.outputs} outputs; give 0 or 1 [samples, outputs]"
                )
            return y.long()
        if y.dim() == 2 and y.shape[1] == 1:
            y = y[:, 0]
        if y.dim() == 2:
            if not _one_hot(y) or y.shape[1] != self.outputs:
                raise InputError(
                    "diagnose: labels of the first batch are one-hot and these are not; for several labels a sample give "
                    "metric='f1', else class numbers [samples]"
                )
            y = y.argmax(1)
        if not bool(y.isfinite().all()):
            raise InputError("diagnose: labels hold NaN or infinite values; drop samples without a label")
        if y.is_floating_point() and not bool((y == y.round()).all()):
            raise InputError("diagnose: labels are no whole numbers; for a regression give metric='r2'")
        y = y.long()
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= max(2, self.outputs)):
            raise InputError(
                f"diagnose: labels run from {int(y.min())} to {int(y.max())} for {self.outputs} outputs; number the classes "
                "0, 1, 2, ..., one output each, and drop samples without a label"
                + ("; for a regression give metric='r2'" if self.outputs == 1 else "")
            )
        return y

    def check_outputs(self, outputs: Tensor) -> str:
        """A note, or "", on a first batch of outputs; InputError where these are probabilities, whose threshold is not 0."""
        y = outputs.detach().double()
        inside = len(y) > 1 and bool((y >= 0).all()) and bool((y <= 1).all()) and bool(y.any())
        if not inside or self.kind not in ("classes", "labels"):
            return ""
        if self.metric == "auroc" and y.shape[1] == 1:  # perhaps a similarity
            return (
                "The outputs lie between 0 and 1 and are taken for logits, so calibration is not that of probabilities."
            )
        if self.kind == "labels" or y.shape[1] == 1 or bool(((y.sum(1) - 1).abs() < 1e-2).all()):
            raise InputError(
                "diagnose: the outputs look like probabilities, and logits are needed; name the module before the softmax "
                "or sigmoid as head, or give call=lambda model, batch: torch.logit(model(...)), of a softmax .log()"
            )
        return ""

    def evaluate(self, outputs: Tensor, labels: Tensor) -> float:
        """The score of outputs ``[N, C]``, every sample counted once."""
        if self.score is not None:
            return float(self.score(outputs, labels))
        if self.metric == "f1":
            guess, truth = outputs > 0, labels.bool()
            return float(2 * (guess & truth).sum() / (guess.sum() + truth.sum()).clamp(min=1))
        if self.metric == "accuracy" and outputs.shape[1] == 1:
            outputs = torch.cat([-outputs, outputs], 1)
        shown = self.margins(outputs) if self.metric in ("auroc", "concordance") else outputs
        y = labels.numpy().reshape(len(labels), -1) if self.kind in ("numbers", "labels") else labels.numpy()
        return float(weighted_scores(self.metric, y, shown.double().numpy(), np.ones((1, len(y))))[0])

    def evaluate_drawn(self, outputs: Tensor, labels: Tensor) -> float:
        """:meth:`evaluate` of rows that were drawn; NaN where a function fails on them, such as without one of the classes."""
        try:
            return self.evaluate(outputs, labels)
        except InputError:
            return math.nan

    def margins(self, outputs: Tensor) -> Tensor:
        """What a ranked score orders: ``[N]``, or ``[N, C]`` for several labels."""
        if self.metric == "macro_auroc":
            return outputs.float()
        return (outputs[:, 1] - outputs[:, 0] if outputs.shape[1] == 2 else outputs[:, 0]).float()

    def answers(self, outputs: Tensor) -> Tensor:
        """Outputs on a scale of answers, ``[N, C]``: probabilities, or the numbers themselves (float64)."""
        if self.kind in ("numbers", "survival", "pairs"):
            return outputs.double()
        y = outputs.float()
        return y.softmax(-1) if self.kind == "classes" and y.shape[-1] > 1 else y.sigmoid()


def _guarded(metric: Callable[[Tensor, Tensor], float], name: str | None) -> Callable[[Tensor, Tensor], float]:
    """The score of a user, whose failure is told in one line."""

    def score(outputs: Tensor, labels: Tensor) -> float:
        try:
            found, reason = float(metric(outputs, labels)), "it gave no finite number"
        except Exception as error:
            found, reason = math.nan, f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        if not math.isfinite(found):
            raise InputError(
                f"diagnose: metric {name} failed on outputs {list(outputs.shape)} and labels {list(labels.shape)} ({reason}); "
                "give a function (outputs, labels) -> number"
            )
        return found

    return score


def _given(adapter: Adapter, batch: Any) -> Any:
    own = getattr(adapter, "labels", None)
    if own is not None:
        return own(batch)
    return batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None


def _tensor(found: Any, adapter: Adapter) -> Tensor:
    """Labels as a tensor on the CPU; text by the adapter's ``classes``."""
    if isinstance(found, np.ndarray) and found.dtype.kind in "biuf":
        found = torch.from_numpy(np.ascontiguousarray(found))
    if not isinstance(found, Tensor) and isinstance(found, (Sequence, np.ndarray)) and not isinstance(found, str):
        values = list(found)
        if values and all(isinstance(v, str) for v in values):
            classes = [str(c) for c in getattr(adapter, "classes", None) or []]
            if not classes:
                raise InputError(
                    f"diagnose: labels are text ({str(values[0])!r}, ...); give class numbers in the order of the outputs, or "
                    "name the classes: adapter.classes = ['cat', 'dog', ...]"
                )
            for value in values:
                if value not in classes:
                    raise unknown("class", str(value), classes)
            return torch.tensor([classes.index(str(v)) for v in values])
        if all(isinstance(v, (int, float, np.number)) for v in values):
            found = torch.tensor([float(v) if isinstance(v, (float, np.floating)) else int(v) for v in values])
    if not isinstance(found, Tensor) or found.dim() not in (1, 2):
        got = f"{found.dtype} {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
        raise InputError(
            f"diagnose: labels are {got}; give class numbers [samples], 0/1 labels or numbers [samples, outputs], or None"
        )
    return found.detach().cpu()


def _kind(y: Tensor, outputs: int) -> str:
    if y.dim() == 2 and y.shape[1] > 1:
        if _binary(y):
            return "classes" if _one_hot(y) and y.shape[1] == outputs else "labels"
        return "numbers"
    if y.is_floating_point() and outputs <= 1 and not _binary(y):
        if bool((y.abs() == 1).all()):
            raise InputError("diagnose: labels are -1 and 1; give 0 and 1, or metric='r2' for a regression")
        return "numbers"
    return "classes"


def _binary(y: Tensor) -> bool:
    return bool(((y == 0) | (y == 1)).all())


def _one_hot(y: Tensor) -> bool:
    return _binary(y) and bool((y.sum(1) == 1).all())
