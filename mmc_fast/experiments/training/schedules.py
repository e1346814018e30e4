"""What changes over a run: λ of the gradient reversal, and when the adversarial part ends."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .config import TrainConfig

__all__ = ["AdversarialStop", "reversal_at"]


def reversal_at(config: TrainConfig, progress: float) -> float:
    """λ at ``progress`` in [0, 1) of the run; with p = progress / reversal_ramp, at most 1:

    "constant": λ. "linear": λ p. "dann": λ (2 / (1 + exp(-10 p)) - 1) (Ganin et al., JMLR 2016, section 5.2).
    """
    if config.ebr is None:
        return 0.0
    lambda_ = config.ebr.reversal
    if config.reversal_schedule == "constant":
        return lambda_
    p = min(1.0, progress / config.reversal_ramp)
    return lambda_ * (p if config.reversal_schedule == "linear" else 2.0 / (1.0 + math.exp(-10.0 * p)) - 1.0)


@dataclass
class AdversarialStop:
    """Early stop of the adversarial part: after ``patience`` watched epochs without a better value it is over for good.

    Under the interleaved schedule only the epochs of L_sem are watched: during L_md alone the task is not trained.
    """

    patience: int | None
    larger_is_better: bool
    best: float | None = None
    bad: int = 0
    stopped_after: int | None = None

    @property
    def stopped(self) -> bool:
        return self.stopped_after is not None

    def watch(self, epoch: int, value: float) -> None:
        """Take the value of an epoch (counted from 1)."""
        if self.patience is None or self.stopped:
            return
        better = self.best is None or (value > self.best if self.larger_is_better else value < self.best)
        if better:
            self.best, self.bad = value, 0
            return
        self.bad += 1
        if self.bad >= self.patience:
            self.stopped_after = epoch
