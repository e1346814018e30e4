"""The two data sets inside of the package: mfeat and support2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmc_fast.experiments.data.files import locate
from mmc_fast.experiments.data.info import DatasetInfo, Entry
from mmc_fast.experiments.data.npz import read_npz
from mmc_fast.experiments.data.raw import RawDataset

__all__ = ["ENTRIES"]

MFEAT = DatasetInfo(
    name="mfeat",
    title="six views of 2,000 handwritten numerals",
    modalities=("fou", "fac", "kar", "pix", "zer", "mor"),
    tasks=("digit",),
    metric="accuracy",
    source="UCI Multiple Features",
    licence="CC BY 4.0",
)
SUPPORT2 = DatasetInfo(
    name="support2",
    title="five clinical views of 9,105 seriously ill patients",
    modalities=("demographics", "disease", "vitals", "labs", "function"),
    tasks=("hospital_death",),
    metric="auroc",
    source="SUPPORT (UCI SUPPORT2)",
    licence="CC BY 4.0",
)


def _mfeat(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    return read_npz(locate("mfeat"), modalities=MFEAT.modalities if modalities is None else modalities)


def _support2(task: str, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    raw = read_npz(locate("support2"), modalities=SUPPORT2.modalities if modalities is None else modalities)
    return replace(raw, nan_policy="indicator")


ENTRIES: tuple[Entry, ...] = ((MFEAT, _mfeat), (SUPPORT2, _support2))
