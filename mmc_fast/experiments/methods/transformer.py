"""Masked late-fusion transformer: a token per modality, absent tokens masked, random masks and consistency in training."""

from __future__ import annotations

from .base import Method
from .standard import fit_standard

__all__ = ["TRANSFORMER"]

TRANSFORMER = Method(
    "transformer",
    "masked transformer + consistency",
    "late-fusion transformer as in Rheude et al. 2025, with modality dropout and consistency",
    fit_standard,
    tuple({"consistency": c, "modality_dropout": p} for c in (1.0, 0.0) for p in (0.5, 0.3)),
    {"fusion": "transformer"},
)
