"""The systems of the comparison as plug-ins of the standard loop, one file each; docs/methods.md describes them."""

from __future__ import annotations

from mmc_fast._util.names import unknown

from .base import BATCH_ROWS, CANDIDATES, Fitted, Method, Task
from .cm_ae import CM_AE
from .dropout import CONSISTENCY, DROPOUT
from .ebr import EBR_PAPER, EBR_ROBUST, EBR_SLIDES, robust_heads
from .grape import GRAPE
from .imputation import MEAN, ZEROS
from .kd import KD, KD_FORMS, distilled
from .late import LATE
from .m3care import M3CARE
from .mt import MT
from .muse import MUSE
from .shaspec import SHASPEC
from .sklearn_baselines import BOOSTING, LOGISTIC
from .smil import SMIL
from .transformer import TRANSFORMER
from .unimodal import UNIMODAL
from .vanilla import VANILLA

__all__ = ["BATCH_ROWS", "CANDIDATES", "METHODS", "Fitted", "Method", "Task", "get"]

_PEERS = (SHASPEC, MUSE, SMIL, CM_AE, MT, GRAPE, M3CARE)
_ALONE = (VANILLA, UNIMODAL, ZEROS, MEAN, DROPOUT, CONSISTENCY, LATE, TRANSFORMER, LOGISTIC, BOOSTING)
_EXTENDED = (GRAPE, M3CARE, MUSE, SMIL, SHASPEC)  # tables 2 and 4 of the paper put KD and EBR under these


def _extended(method: Method) -> tuple[Method, Method]:
    heads = {"ebr": robust_heads() | {"cross_recovery": 0.0}}
    if method is SMIL:  # its step is differentiated twice, which the fused operator does not offer
        heads["ebr"]["backend"] = "reference"
    return (
        method.with_settings(f"{method.name}+kd", f"{method.title} + KD", distilled(KD.fixed["kd"])),
        method.with_settings(f"{method.name}+ebr", f"{method.title} + EBR", heads),
    )


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *_ALONE,
        *KD_FORMS,
        EBR_PAPER,
        EBR_SLIDES,
        EBR_ROBUST,
        *_PEERS,
        *(extended for method in _EXTENDED for extended in _extended(method)),
    )
}


def get(name: str) -> Method:
    """A method by name. Raises InputError with the nearest name where there is none."""
    if name not in METHODS:
        raise unknown("method", name, tuple(METHODS))
    return METHODS[name]
