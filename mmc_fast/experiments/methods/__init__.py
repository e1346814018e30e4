"""The systems of the comparison as plug-ins of the standard loop, the re-implemented ones one file each; docs/experiments/methods.md describes them."""

from __future__ import annotations

from mmc_fast._util.names import unknown

from .base import BATCH_ROWS, CANDIDATES, Fitted, Method, Task
from .cm_ae import CM_AE
from .ensembles import ENSEMBLES, ORACLES
from .graph import GRAPE, MUSE
from .imputation import MEAN, ZEROS
from .m3care import M3CARE
from .mt import MT
from .product import PRODUCT
from .shaspec import SHASPEC
from .sklearn_baselines import BOOSTING, BOOSTING_MASKED, LOGISTIC
from .smil import SMIL
from .standard import KD, STANDARD, distilled, robust_heads

__all__ = ["BATCH_ROWS", "CANDIDATES", "METHODS", "Fitted", "Method", "Task", "get"]

_BASELINES = (SHASPEC, MUSE, SMIL, CM_AE, MT, GRAPE, M3CARE)
_EXTENDED = (GRAPE, M3CARE, MUSE, SMIL, SHASPEC)  # tables 2 and 4 of the paper put KD and EBR under these


def _extended(method: Method) -> tuple[Method, Method]:
    heads = {"ebr": robust_heads() | {"cross_recovery": 0.0}}
    if method is SMIL:  # its step is differentiated twice, which the fused operator does not offer
        heads["ebr"]["backend"] = "reference"
    return (
        method.with_settings(f"{method.name}+kd", f"{method.title} + KD", distilled(KD.fixed["kd"])),
        method.with_settings(f"{method.name}+ebr", f"{method.title} + EBR", heads),
    )


_SIMPLE = (
    *STANDARD[:2],
    ZEROS,
    MEAN,
    *STANDARD[2:6],
    LOGISTIC,
    BOOSTING,
    BOOSTING_MASKED,
    PRODUCT,
    *STANDARD[6:],
    *ENSEMBLES,
    *ORACLES,
)
_ALL = (*_SIMPLE, *_BASELINES, *(extended for method in _EXTENDED for extended in _extended(method)))
METHODS: dict[str, Method] = {method.name: method for method in _ALL}


def get(name: str) -> Method:
    """A method by name. Raises InputError with the nearest name where there is none."""
    if name not in METHODS:
        raise unknown("method", name, tuple(METHODS))
    return METHODS[name]
