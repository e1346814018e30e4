"""The two data sets inside of the package: mfeat and support2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mmc_fast.data.info import DatasetInfo, Entry
from mmc_fast.data.npz import read_npz
from mmc_fast.data.raw import RawDataset

__all__ = ["ENTRIES", "embedded_path"]


def embedded_path(name: str) -> Path:
    """Where the package keeps the file of an embedded set."""
    return Path(__file__).parent / "embedded" / f"{name}.npz"


def _mfeat(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    return read_npz(embedded_path("mfeat"), modalities=modalities)


def _support2(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    return replace(read_npz(embedded_path("support2"), modalities=modalities), nan_policy="indicator")


ENTRIES: tuple[Entry, ...] = (
    (
        DatasetInfo(
            name="mfeat",
            title="six views of 2,000 handwritten numerals",
            modalities=("fou", "fac", "kar", "pix", "zer", "mor"),
            tasks=("digit",),
            metric="accuracy",
            source="UCI Multiple Features",
            licence="CC BY 4.0",
        ),
        _mfeat,
    ),
    (
        DatasetInfo(
            name="support2",
            title="five clinical views of 9,105 seriously ill patients",
            modalities=("demographics", "disease", "vitals", "labs", "function"),
            tasks=("hospital_death",),
            metric="auroc",
            source="SUPPORT (UCI SUPPORT2)",
            licence="CC BY 4.0",
        ),
        _support2,
    ),
)
