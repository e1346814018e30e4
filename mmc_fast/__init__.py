"""Explicit basis reallocation (EBR) and modality-collapse diagnosis for PyTorch."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from .analysis.agop import AGOPAccumulator as AGOPAccumulator
    from .analysis.agop import AGOPResult as AGOPResult
    from .analysis.agop import agop as agop
    from .analysis.diagnosis import Diagnosis as Diagnosis
    from .analysis.diagnosis import diagnose as diagnose
    from .analysis.explain import explain as explain
    from .integrations import ModelAdapter as ModelAdapter
    from .integrations import apply_ebr as apply_ebr

__version__ = "0.1.0"

# An installed package holds mmc_fast/kernels; in a source tree the same files lie in kernels/ beside mmc_fast/.
if not (_Path(__file__).parent / "kernels").is_dir():
    from mmc_fast import _checkout

    _checkout.install_finder(_Path(__file__).resolve().parents[1] / "kernels")

# Imported on first use, so that `import mmc_fast` stays quick: name -> the module that holds it.
_LAZY = {
    "AGOPAccumulator": "mmc_fast.analysis.agop",
    "AGOPResult": "mmc_fast.analysis.agop",
    "Diagnosis": "mmc_fast.analysis.diagnosis",
    "ModelAdapter": "mmc_fast.integrations",
    "agop": "mmc_fast.analysis.agop",
    "apply_ebr": "mmc_fast.integrations",
    "diagnose": "mmc_fast.analysis.diagnosis",
    "explain": "mmc_fast.analysis.explain",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
