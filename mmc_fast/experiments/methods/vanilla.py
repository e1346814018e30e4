"""Vanilla: encoders, concatenation, one loss on what is there. An absent modality enters the fusion as zeros."""

from __future__ import annotations

from .base import Method
from .standard import RATES_OF_LEARNING, fit_standard

__all__ = ["VANILLA"]

VANILLA = Method("vanilla", "vanilla", "the standard loop without additions", fit_standard, RATES_OF_LEARNING)
