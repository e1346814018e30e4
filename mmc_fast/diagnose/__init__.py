"""``mmc_fast.diagnose``: which modality a model uses, which it lost, and why."""

from mmc_fast._util.callable_package import make_callable

from .adapter import Adapter, RunAdapter
from .result import Diagnosis, DiagnosisComparison, Measure
from .run import diagnose
from .verdict import THRESHOLDS, ModalityVerdict, Thresholds

__all__ = [
    "THRESHOLDS",
    "Adapter",
    "Diagnosis",
    "DiagnosisComparison",
    "Measure",
    "ModalityVerdict",
    "RunAdapter",
    "Thresholds",
    "diagnose",
]

make_callable(__name__)
