"""EBR in models that are not ours: ``apply_ebr`` on any ``nn.Module``; the Lightning callback is in ``.lightning``."""

from .adapter import ModelAdapter
from .apply import apply_ebr, load_ebr
from .handle import EBRHandle, find_handles
from .losses import EBRLosses
from .report import ApplyReport, Placement
from .site import Site

__all__ = [
    "ApplyReport",
    "EBRHandle",
    "EBRLosses",
    "ModelAdapter",
    "Placement",
    "Site",
    "apply_ebr",
    "find_handles",
    "load_ebr",
]
