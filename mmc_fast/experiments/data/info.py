"""What the registry says about a data set, the shape of the functions that load one, and where its file is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mmc_fast._env import env
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.raw import RawDataset

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


def find(name: str) -> Path | None:
    """The file of a data set; the embedded one first, None where there is none."""
    embedded = Path(__file__).parent / "embedded" / f"{name}.npz"
    if embedded.is_file():
        return embedded
    folder = env("MMC_DATA")
    path = Path(folder, f"{name}.npz") if folder else None
    return path if path is not None and path.is_file() else None


def locate(name: str) -> Path:
    """The same, or :class:`~mmc_fast.errors.InputError` that says how to get it."""
    path = find(name)
    if path is None:
        raise InputError(how_to_get(name))
    return path


def how_to_get(name: str) -> str:
    """One line on a data set that is not here: why, and what to do."""
    folder = env("MMC_DATA")
    state = f"MMC_DATA is {folder!r}" if folder else "MMC_DATA is not set"
    return (
        f"{name}: this data set is not part of the package and {state}; "
        f"set MMC_DATA to the folder that holds {name}.npz, or make it: mmc-fast data prepare {name} --from FOLDER."
    )
