"""Survival: time until an event, censored where observation ends first; hazards of intervals, concordance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmc_fast._util.extras import require
from mmc_fast.errors import InputError

from .base import Reduction, Task, check_numbers, checked, reduced

INTERVALS = 20  # at most


@dataclass(frozen=True)
class Survival(Task):
    """Labels float64 ``[N, 2]``: time ≥ 0, and 1 for an event or 0 for the end of observation.

    Outputs are logits of the hazards h_k of the intervals ``(edges[k-1], edges[k]]``, answers the survival curve
    ``S(edges[k]) = Π_{j ≤ k} (1 − h_j)``. ``edges``: quantiles of the event times of the training rows, so that each interval
    holds about as many events. ``names``: of the two label columns. Source: Gensheimer and Narasimhan, PeerJ 2019.
    """

    edges: tuple[float, ...] = ()
    kind: ClassVar[str] = "survival"
    prior_text: ClassVar[str] = "the survival curve of all training rows"

    @property
    def metric(self) -> str:
        return "concordance"

    @property
    def outputs(self) -> int:
        return len(self.edges)

    def tensor(self, labels: np.ndarray) -> Tensor:
        return torch.from_numpy(labels.astype(np.float64))

    def unknown(self, rows: int) -> np.ndarray:
        return np.zeros((rows, 2))

    def check(self, labels: Tensor, where: str) -> None:
        check_numbers(labels, 2, torch.float64, where)
        bad = (labels[:, 0] < 0) | ((labels[:, 1] != 0) & (labels[:, 1] != 1))
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InputError(
                f"{where}: time and event are {labels[row].tolist()} in row {row}; a time is at least 0, an event 0 or 1."
            )

    def check_part(self, labels: Tensor, part: str, where: str) -> None:
        if not self.scorable(labels):
            raise InputError(
                f"{where}: nobody in the {part} part outlived an event, so survival times cannot be compared; give it other rows."
            )

    def fit(self, labels: Tensor) -> Survival:
        events = labels[labels[:, 1] == 1, 0]
        count = min(INTERVALS, len(events.unique()))
        shares = torch.linspace(0, 1, count + 1, dtype=torch.float64)[1:]
        return replace(self, edges=tuple(torch.quantile(events, shares, interpolation="higher").unique().tolist()))

    def strata(self, labels: np.ndarray) -> np.ndarray:
        """Whether there was an event."""
        return labels[:, 1].astype(np.int64)

    def _lived(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Intervals that a row entered and whose end, or event, was observed, and those with its event; bool ``[N, K]``."""
        edges = labels.new_tensor(self.edges)
        time, event = labels[:, :1], labels[:, 1:] == 1
        survived = edges <= time
        begins = F.pad(edges[:-1], (1, 0), value=-1.0)
        died = event & (begins < time) & (time <= edges)
        return survived | died, died

    def loss(self, outputs: Tensor, labels: Tensor, reduction: Reduction = "sum") -> Tensor:
        """Negative log-likelihood of the observed intervals."""
        observed, died = self._lived(labels)
        each = F.binary_cross_entropy_with_logits(outputs, died.to(outputs.dtype), reduction="none")
        return reduced(torch.where(observed, each, 0.0).sum(-1), reduction)

    def divergence(self, outputs: Tensor, target: Tensor) -> Tensor:
        """KL between the distributions of the interval of the event."""
        log = F.logsigmoid
        each = target.sigmoid() * (log(target) - log(outputs)) + (-target).sigmoid() * (log(-target) - log(-outputs))
        reached = F.pad(log(-target).cumsum(-1)[:, :-1], (1, 0)).exp()
        return (reached * each).sum()

    def prior(self, labels: Tensor) -> Tensor:
        """Events over rows at risk in each interval."""
        observed, died = self._lived(labels)
        hazards = died.sum(0).double() / observed.sum(0).clamp(min=1)
        return hazards.clamp(1e-6, 1 - 1e-6).logit().float()

    def answers(self, outputs: Tensor) -> Tensor:
        return F.logsigmoid(-outputs.double()).cumsum(-1).exp()

    def inverse(self, answers: Tensor) -> Tensor:
        before = F.pad(answers[:, :-1], (1, 0), value=1.0)
        return (1 - answers / before.clamp(min=1e-12)).logit(1e-7)

    def expected(self, answers: Tensor) -> Tensor:
        """Mean time ``[N]`` until the event or the last edge: the area under the curve, linear between edges."""
        curve = F.pad(answers, (1, 0), value=1.0)
        width = answers.new_tensor((0.0, *self.edges)).diff()
        return ((curve[:, 1:] + curve[:, :-1]) / 2) @ width

    def ranked(self, outputs: Tensor) -> Tensor:
        return -self.expected(self.answers(outputs))[:, None]

    def scored(self, answers: Tensor) -> Tensor:
        return -self.expected(answers)

    def scorable(self, labels: Tensor) -> bool:
        time, event = labels[:, 0], labels[:, 1] == 1
        return bool(event.any()) and bool(
            (time > time[event].min()).any() | ((time == time[event].min()) & ~event).any()
        )

    def score(self, answers: Tensor, labels: Tensor) -> float:
        """Harrell's concordance of the expected times."""
        checked(answers, labels)
        if not self.scorable(labels):
            raise InputError("score: nobody outlived an event, so there is no concordance; give other rows")
        concordance = require("torchsurv.metrics.cindex", extra="experiments").ConcordanceIndex()
        return float(concordance(self.scored(answers), labels[:, 1] == 1, labels[:, 0], instate=False))

    def scores(self, answers: Tensor, labels: Tensor) -> dict[str, float]:
        return {"score": self.score(answers, labels)}

    def columns(self, answers: Tensor) -> dict[str, Any]:
        """``prediction``: expected time within the span of training; ``s_TIME``: probability to live longer."""
        found: dict[str, Any] = {"prediction": self.expected(answers).numpy()}
        return found | {f"s_{edge:g}": answers[:, k].numpy() for k, edge in enumerate(self.edges)}
