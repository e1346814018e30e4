"""Whether a modality moves the outputs the way that it would answer by itself, on a sample of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .measures.outputs import alignment
from .measures.reliance import Afresh
from .reservoir import Reservoir
from .result import Measure
from .subsets import bootstrap_interval, resampled_rows
from .tasks import Task

_NUMBERS, _FEWEST, _LEAST = 2**22, 256, 1e-6


class EffectRows:
    """What each modality moves in the outputs, for a sample of rows, and what unimodal models answer where an adapter has them.

    Outputs are log-probabilities less their mean where there are classes, the logit where there are two. The rows are the first ones of the sample
    that the first pass keeps, fewer where there are many classes.
    """

    def __init__(self, task: Task, names: list[str], size: int, seed: int) -> None:
        self.task, self.names, self.seed = task, names, seed
        self.kept = Reservoir(min(size, max(_FEWEST, _NUMBERS // (max(1, task.outputs) * len(names)))), seed)
        self.draws = 1

    def add(self, index: int, outputs: Mapping[tuple[str, int], Tensor]) -> None:
        """Outputs ``[B, C]`` of batch ``index`` by condition and draw."""
        full = outputs[f"coalition.{(1 << len(self.names)) - 1}", 0]
        near = self.kept.near(index, len(full))
        if not bool(near.any()):
            return
        whole, columns = self._answers(full[near]), dict[str, Tensor]()
        for i, name in enumerate(self.names):
            moved = [self._answers(y[near]) for (condition, _), y in outputs.items() if condition == f"shuffled.{i}"]
            columns[f"effect.{name}"] = (whole - torch.stack(moved).mean(0)).float()
            self.draws = len(moved)
            if (f"alone.{name}", 0) in outputs:
                columns[f"alone.{name}"] = self._answers(outputs[f"alone.{name}", 0][near]).float()
        self.kept.add(index, columns, near)

    def _answers(self, outputs: Tensor) -> Tensor:
        y = outputs.detach().cpu().double()
        return self._centred(y.log_softmax(1)) if self.task.kind == "classes" and y.shape[1] > 1 else y

    def _probed(self, outputs: Tensor) -> Tensor:
        """Outputs of a probe, which are probabilities where there are classes, on the scale of the effects."""
        y = outputs.double()
        if self.task.kind == "classes":
            y = self._centred(y.clamp(min=_LEAST).log())
        return y

    @staticmethod
    def _centred(y: Tensor) -> Tensor:
        """Two classes: the one column that a logit has too."""
        return y[:, 1:] - y[:, :1] if y.shape[1] == 2 else y - y.mean(1, True)

    def measures(self, probes: Mapping[str, Afresh], resamples: int, level: float) -> dict[str, Measure]:
        """``alignment.M`` of each modality whose own answers are known, those of unimodal models before those of ``probes``."""
        found = {}
        for name in self.names:
            effect, alone = (self.kept.columns.get(f"{kind}.{name}") for kind in ("effect", "alone"))
            if effect is None or (alone is None and name not in probes):
                continue
            if alone is None:
                probe, place = probes[name], torch.full((len(effect),), -1)
                inside = probe.rows < len(effect)
                place[probe.rows[inside]] = torch.nonzero(inside).flatten()
                alone, effect = self._probed(probe.outputs[place[place >= 0]]), effect[place >= 0]
            if len(effect) < 10 or alone.shape != effect.shape:
                continue
            value, drawn = alignment(effect, alone, self.draws, resampled_rows(len(effect), resamples, self.seed))
            found[f"alignment.{name}"] = bootstrap_interval(value, drawn, level)
        return found

    def to_state(self) -> dict[str, Any]:
        return {"kept": self.kept.to_state(), "draws": self.draws}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.kept.load_state(state["kept"])
        self.draws = int(state["draws"])
