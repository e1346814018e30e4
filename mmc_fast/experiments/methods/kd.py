"""Cross-modal distillation before a vanilla run: three losses, five orders of the teachers.

Source: Chaudhuri et al., ICML 2025, after contrastive representation distillation (Tian et al. 2020).
"""

from __future__ import annotations

from typing import Any

from .base import Method
from .standard import fit_standard

__all__ = ["KD", "KD_FORMS", "distilled"]

_WEAKEST_FIRST = {"teachers": "stronger", "order": "weakest_first"}
_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "kd": ("KD (InfoNCE)", {"loss": "info_nce"} | _WEAKEST_FIRST),
    "kd-kl": ("KD (KL)", {"loss": "kl"} | _WEAKEST_FIRST),
    "kd-mse": ("KD (feature MSE)", {"loss": "mse"} | _WEAKEST_FIRST),
    "kd-strongest-first": ("KD, strongest to weakest", {"teachers": "stronger", "order": "strongest_first"}),
    "kd-random": ("KD, random order", {"teachers": "stronger", "order": "random"}),
    "kd-simultaneous": ("KD, simultaneous", {"teachers": "stronger", "order": "simultaneous"}),
    "kd-strongest": ("KD, strongest only", {"teachers": "strongest"}),
}


def distilled(section: dict[str, Any]) -> dict[str, Any]:
    """Settings that put distillation before a run."""
    return {"kd": section, "unimodal_share": 0.3}


KD_FORMS = tuple(
    Method(
        name,
        title,
        "Chaudhuri et al., ICML 2025",
        fit_standard,
        tuple({"lr": lr, "kd": {"epochs": n}} for lr in (1e-3, 3e-4) for n in (10, 5)),
        distilled(section),
    )
    for name, (title, section) in _FORMS.items()
)
KD = KD_FORMS[0]
