"""Multimodal data: the registry, a user's own files, missingness."""

from __future__ import annotations

from mmc_fast.data.dataset import MultimodalDataset, Part
from mmc_fast.data.info import DatasetInfo
from mmc_fast.data.missing import Missingness, mcar
from mmc_fast.data.registry import available, load

__all__ = ["DatasetInfo", "Missingness", "MultimodalDataset", "Part", "available", "load", "mcar"]
