"""Layers made of plain ``nn.Linear`` parameters, and the rules for substituting missing modalities."""

from mmc_fast.functional import EBROutput

from .config import EBRConfig
from .ebr import EBRHead

__all__ = ["EBRConfig", "EBRHead", "EBROutput"]
