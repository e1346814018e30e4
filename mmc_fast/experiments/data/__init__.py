"""Multimodal data: the registry, a user's own files, missingness, synthetic sets."""

from __future__ import annotations

from mmc_fast.experiments.data.dataset import MultimodalDataset, Part
from mmc_fast.experiments.data.info import DatasetInfo
from mmc_fast.experiments.data.missing import Missingness, mcar
from mmc_fast.experiments.data.registry import available, load
from mmc_fast.experiments.data.synthetic import SyntheticModality, planted_collapse, synthetic

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
