"""What a model answers for every set of present modalities, on a sample of rows: for tables, calibration and label-free shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .measures.calibration import expected_calibration_error, silent_failures
from .measures.outputs import output_shapley
from .reservoir import Reservoir
from .result import Measure
from .tasks import Task

CONFIDENT = 0.9
_MOST_RESAMPLES = 200


class SubsetRows:
    """For up to ``size`` rows and each of the 2^m coalitions: predicted class, its probability, Brier score, distance moved.

    ``moved``: squared distance of the answers (probabilities, or numbers in a regression) from those with all modalities.
    """

    def __init__(self, task: Task | None, names: list[str], size: int, seed: int) -> None:
        self.task, self.names, self.size = task, names, 2 ** len(names)
        self.kept, self.seed, self.rows = Reservoir(size, seed), seed, 0

    @property
    def _classes(self) -> bool:
        return self.task is not None and self.task.kind == "classes"

    def add(self, index: int, outputs: Mapping[int, Tensor], labels: Tensor | None) -> None:
        """Outputs ``[B, C]`` of batch ``index`` by coalition (the last one holds all) and its labels.

        Without any modality the mean answer stands in where a model has none.
        """
        count = len(outputs[self.size - 1])
        near = self.kept.near(index, count)
        first, self.rows = self.rows, self.rows + count
        if not bool(near.any()):
            return
        outputs = {c: y.detach().cpu()[near] for c, y in outputs.items()}
        labels = None if labels is None else labels[near]
        whole = self._answers(outputs[self.size - 1])
        found = [
            self._answers(outputs[c]) if c in outputs else whole.mean(0, True).expand_as(whole)
            for c in range(self.size)
        ]
        columns = {
            "row": first + torch.nonzero(near).flatten(),
            "moved": torch.stack([(p - whole).square().sum(1) for p in found], 1).float(),
        }
        if self._classes and labels is not None:
            truth = torch.nn.functional.one_hot(labels, whole.shape[1])
            top = [p.max(1) for p in found]
            columns |= {
                "label": labels,
                "predicted": torch.stack([t.indices for t in top], 1),
                "confidence": torch.stack([t.values for t in top], 1).float(),
                "brier": torch.stack([(p - truth).square().sum(1) for p in found], 1).float(),
            }
        self.kept.add(index, columns, near)

    def _answers(self, outputs: Tensor) -> Tensor:
        y = outputs.detach().cpu().double()
        if self.task is None:  # unlabelled outputs: numbers where there is one, else classes
            return y.softmax(1) if y.shape[1] > 1 else y
        p = self.task.answers(y)
        return torch.cat([1 - p, p], 1) if self._classes and p.shape[1] == 1 else p

    def measures(self, resamples: int, level: float, each: bool) -> tuple[dict[str, Measure], dict[str, Any]]:
        """Shares of outputs and silent failures of each modality with intervals; a table of sets, and of samples for ``each``."""
        columns, full = self.kept.columns, self.size - 1
        if not columns:
            return {}, {}
        moved = columns["moved"].double().numpy()
        counts = resampled_rows(len(moved), resamples, self.seed)
        shares = output_shapley(moved.mean(0))
        drawn = np.array([output_shapley(row) for row in counts @ moved]).reshape(len(counts), len(self.names))
        measures = {
            f"output_share.{n}": bootstrap_interval(shares[i], drawn[:, i], level) for i, n in enumerate(self.names)
        }
        if "label" not in columns:
            return measures, {}
        right = columns["predicted"] == columns["label"][:, None]
        samples: dict[str, Any] = {
            "row": columns["row"].tolist(), "label": columns["label"].tolist(), "predicted": columns["predicted"][:, full].tolist(),
            "confidence": _rounded(columns["confidence"][:, full]),
        }  # fmt: skip
        for i, name in enumerate(self.names):
            without = full & ~(1 << i)
            silent = silent_failures(right[:, full], right[:, without], columns["confidence"][:, without], CONFIDENT)
            rate = silent.double().numpy()
            measures[f"silent_failures.{name}"] = bootstrap_interval(rate.mean(), counts @ rate / len(rate), level)
            samples |= {
                f"predicted_without.{name}": columns["predicted"][:, without].tolist(),
                f"confidence_without.{name}": _rounded(columns["confidence"][:, without]),
                f"silent_failure.{name}": silent.tolist(),
            }
        table = [self._subset(c, right, columns) for c in range(1, self.size)]
        measures["ece.all"], measures["brier.all"] = Measure(table[-1]["ece"]), Measure(table[-1]["brier"])
        tables: dict[str, Any] = {"samples": samples} if each else {}
        return measures, tables | {"subsets": sorted(table, key=lambda row: row["accuracy"])}

    def _subset(self, c: int, right: Tensor, columns: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "present": [name for i, name in enumerate(self.names) if c >> i & 1],
            "accuracy": float(right[:, c].double().mean()),
            "ece": expected_calibration_error(columns["confidence"][:, c], right[:, c]),
            "brier": float(columns["brier"][:, c].double().mean()),
        }

    def to_state(self) -> dict[str, Any]:
        return {"kept": self.kept.to_state(), "rows": self.rows}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.kept.load_state(state["kept"])
        self.rows = int(state["rows"])


def resampled_rows(rows: int, resamples: int, seed: int) -> np.ndarray:
    """How often each of so many resamples holds each row, ``[R, N]``."""
    random = np.random.default_rng([seed, 17])
    return random.multinomial(rows, np.full(rows, 1 / rows), size=min(resamples, _MOST_RESAMPLES)).astype(np.float64)


def bootstrap_interval(value: float, drawn: np.ndarray, level: float) -> Measure:
    """Percentiles of the bootstrap over rows."""
    if not np.isfinite(value):
        return Measure(None)
    drawn = drawn[np.isfinite(drawn)]
    if len(drawn) < 10:
        return Measure(float(value))
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Measure(
        float(value), float(drawn.std(ddof=1)), min(float(low), float(value)), max(float(high), float(value))
    )


def _rounded(values: Tensor) -> list[float]:
    return [round(float(v), 4) for v in values]
