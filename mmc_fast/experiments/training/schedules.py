"""When the adversarial part ends."""

from __future__ import annotations

from dataclasses import dataclass


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
