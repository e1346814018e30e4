"""Late fusion: a classifier per modality, the mean of the logits of those that are present."""

from __future__ import annotations

from .base import Method
from .standard import RATES_OF_LEARNING, fit_standard

__all__ = ["LATE"]

LATE = Method("late", "late fusion", "decision averaging", fit_standard, RATES_OF_LEARNING, {"fusion": "late"})
