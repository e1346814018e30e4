"""Modality dropout: random masks in training; and with consistency between masked and complete predictions."""

from __future__ import annotations

from .base import Method
from .standard import fit_standard

__all__ = ["CONSISTENCY", "DROPOUT"]

DROPOUT = Method(
    "dropout",
    "modality dropout",
    "Neverova et al., ModDrop, TPAMI 2016",
    fit_standard,
    tuple({"modality_dropout": p, "lr": lr} for lr in (1e-3, 3e-4) for p in (0.5, 0.3)),
)
CONSISTENCY = Method(
    "consistency",
    "modality dropout + consistency",
    "masked predictions are held to complete ones (docs/study.md)",
    fit_standard,
    tuple({"modality_dropout": p, "consistency": c} for c in (1.0, 3.0) for p in (0.5, 0.3)),
)
