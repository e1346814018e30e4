"""Explicit basis reallocation (EBR) and modality-collapse diagnosis for PyTorch."""

__version__ = "0.1.0"
