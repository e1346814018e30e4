"""``mmc_fast.diagnose``: which modality a model uses, which it lost, and why."""

from .adapter import Adapter, RunAdapter
from .result import Diagnosis, DiagnosisComparison, Measure
from .run import diagnose
from .verdicts import THRESHOLDS, ModalityVerdict, Thresholds

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
