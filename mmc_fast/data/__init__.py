"""Multimodal data: the registry, a user's own files, missingness, synthetic sets."""

from __future__ import annotations

from mmc_fast.data.dataset import MultimodalDataset, Part
from mmc_fast.data.info import DatasetInfo
from mmc_fast.data.missing import Missingness, mcar
from mmc_fast.data.registry import available, load
from mmc_fast.data.synthetic import SyntheticModality, planted_collapse, synthetic

__all__ = [
    "DatasetInfo",
    "Missingness",
    "MultimodalDataset",
    "Part",
    "SyntheticModality",
    "available",
    "load",
    "mcar",
    "planted_collapse",
    "synthetic",
]
