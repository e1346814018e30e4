"""What the registry says about a data set, and the shape of the functions that load one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mmc_fast.experiments.data.raw import RawDataset

__all__ = ["DatasetInfo", "Entry", "Loader"]

Loader = Callable[[str, "str | None", "Sequence[str] | None"], RawDataset]  # task, variant, modalities


@dataclass(frozen=True)
class DatasetInfo:
    """One entry of the registry. The first task and the first variant are the defaults.

    ``modalities`` are those of the default task. ``found``: the set can be loaded here, being embedded in the package
    or in the folder that ``MMC_DATA`` names.
    """

    name: str
    title: str
    modalities: tuple[str, ...]
    tasks: tuple[str, ...]
    metric: str
    source: str
    licence: str
    variants: tuple[str, ...] = field(default=())
    found: bool = field(default=False)


Entry = tuple[DatasetInfo, Loader]
