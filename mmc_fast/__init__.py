"""Explicit basis reallocation (EBR) and modality-collapse diagnosis for PyTorch."""

from pathlib import Path as _Path
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from mmc_fast.agop import AGOPAccumulator as AGOPAccumulator
    from mmc_fast.agop import AGOPResult as AGOPResult
    from mmc_fast.agop import agop as agop
    from mmc_fast.agop.explain import explain as explain
    from mmc_fast.diagnose import Diagnosis as Diagnosis
    from mmc_fast.diagnose import diagnose as diagnose
    from mmc_fast.integrations import ModelAdapter as ModelAdapter
    from mmc_fast.integrations import apply_ebr as apply_ebr
    from mmc_fast.integrations import load_ebr as load_ebr
    from mmc_fast.nn.graphs import graphed as graphed

__version__ = "0.1.0"

# An installed package holds mmc_fast/kernels; in a source tree the same files lie in kernels/ beside mmc_fast/.
if not (_Path(__file__).parent / "kernels").is_dir():
    from mmc_fast import _checkout

    _checkout.install_finder(_Path(__file__).resolve().parents[1] / "kernels")

# Imported on first use, so that `import mmc_fast` stays quick: name -> the module that holds it. ``agop`` and
# ``diagnose`` are packages that are called like the function of their name.
_LAZY = {
    "AGOPAccumulator": "mmc_fast.agop",
    "AGOPResult": "mmc_fast.agop",
    "Diagnosis": "mmc_fast.diagnose",
    "ModelAdapter": "mmc_fast.integrations",
    "agop": "mmc_fast.agop",
    "apply_ebr": "mmc_fast.integrations",
    "diagnose": "mmc_fast.diagnose",
    "explain": "mmc_fast.agop.explain",
    "graphed": "mmc_fast.nn.graphs",
    "load_ebr": "mmc_fast.integrations",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(_LAZY[name])
    value = module if _LAZY[name] == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
