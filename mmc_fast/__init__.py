"""Explicit basis reallocation (EBR) and modality-collapse diagnosis for PyTorch."""

from pathlib import Path as _Path

__version__ = "0.1.0"

# An installed package holds mmc_fast/kernels; in a source tree the same files lie in kernels/ beside mmc_fast/.
if not (_Path(__file__).parent / "kernels").is_dir():
    from mmc_fast import _checkout

    _checkout.install_finder(_Path(__file__).resolve().parents[1] / "kernels")
