"""``mmc_fast.diagnose``: which modality a model uses, which it lost, and why."""

from mmc_fast._util.callable_package import make_callable

from .adapter import Adapter
from .diagnosis import Diagnosis
from .options import DiagnoseOptions
from .result import DiagnosisComparison, DiagnosisData, Measure
from .run import diagnose
from .verdict import THRESHOLDS, ModalityVerdict, Thresholds

__all__ = [
    "THRESHOLDS",
    "Adapter",
    "DiagnoseOptions",
    "Diagnosis",
    "DiagnosisComparison",
    "DiagnosisData",
    "Measure",
    "ModalityVerdict",
    "Thresholds",
    "diagnose",
]

make_callable(__name__)
