"""EBR in three forms: the paper's, the slides', and the robust one of docs/study.md."""

from __future__ import annotations

from typing import Any

from .base import Method
from .standard import fit_standard

__all__ = ["EBR_PAPER", "EBR_ROBUST", "EBR_SLIDES", "SMALL_HEADS", "robust_heads"]

SMALL_HEADS: dict[str, Any] = {"hidden_dim": 128, "latent_dim": 64, "psi_dims": [64, 32]}
_SOURCE = "Chaudhuri et al., ICML 2025"
_PLAIN = {"residual": False, "normalize": False, "substitute": "ranked", "ranking": "reference"}


def robust_heads() -> dict[str, Any]:
    """The ``ebr`` section of the robust form."""
    return SMALL_HEADS | {
        "residual": True, "normalize": True, "substitute": "mean", "reversal": 0.1, "cross_recovery": 0.1
    }  # fmt: skip


EBR_PAPER = Method(
    "ebr-paper",
    "EBR (paper)",
    _SOURCE,
    fit_standard,
    (
        {"ebr": {"reversal": 0.01}},
        {"ebr": {"reversal": 0.1}},
        {"ebr": {"reversal": 1.0}},
        {"ebr": {"reversal": 0.01, "schedule": "interleave", "interleave_epochs": 2}},
    ),
    {"ebr": SMALL_HEADS | _PLAIN, "unimodal_share": 0.3},
)
EBR_SLIDES = Method(
    "ebr-slides",
    "EBR (slides)",
    f"{_SOURCE}, talk slides",
    fit_standard,
    tuple({"ebr": {"reversal": v, "reconstruction": r}} for r in (1.0, 0.1) for v in (0.01, 0.1)),
    {"ebr": SMALL_HEADS | _PLAIN | {"patience": 5}, "unimodal_share": 0.3},
)
EBR_ROBUST = Method(
    "ebr-robust",
    "EBR robust",
    f"{_SOURCE}, in the form of docs/study.md",
    fit_standard,
    (
        {},
        {"ebr": {"cross_recovery": 0.0}},
        {"consistency": 3.0},
        {"fusion": "transformer"},
    ),
    {"ebr": robust_heads(), "modality_dropout": 0.5, "substitute_in_training": True, "consistency": 1.0},
)
