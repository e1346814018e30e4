"""Builders: from what a publisher ships to the npz file that the registry loads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmc_fast._util.names import choose
from mmc_fast.experiments.data.prepare import (
    avmnist,
    diabetes130,
    eicu_demo,
    fsdd_logmel20,
    mfeat,
    mimic4,
    p2012,
    support2,
)
from mmc_fast.experiments.data.prepare.originals import Progress
from mmc_fast.experiments.data.prepare.recipe import Recipe, check_file, prepare_file

__all__ = ["RECIPES", "check", "prepare"]

RECIPES: dict[str, Recipe] = {
    "mfeat": mfeat.RECIPE,
    "support2": support2.RECIPE,
    "avmnist": avmnist.RECIPE,
    "avmnist_small": avmnist.SMALL,
    "fsdd_logmel20": fsdd_logmel20.RECIPE,
    "p2012": p2012.RECIPE,
    "diabetes130": diabetes130.RECIPE,
    "eicu_demo": eicu_demo.RECIPE,
    "mimic4_demo": mimic4.DEMO,
    "mimic4": mimic4.RECIPE,
}


def prepare(
    name: str,
    originals: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Make ``out/NAME.npz`` from the publisher's files in one or several folders; returns its path.

    Files may lie in subfolders, gzipped, or in zip and tar archives, under the publisher's names. The same originals give
    the same bytes (with the same zlib).

    Args:
        name: a data set of :data:`RECIPES`.
        originals: folders to look in.
        out: folder of the result.
        verify: refuse originals whose content is not that of the release that the set is defined on.
        progress: called with a phase, what is done of it, and how much there is (None where that is not known).

    Raises:
        InputError: an unknown set; originals that are missing, damaged or of another release; one line that says which,
            and where to get them under which terms.
    """
    folders = [originals] if isinstance(originals, str | Path) else list(originals)
    recipe = RECIPES[choose("data set", name, list(RECIPES))]
    return prepare_file(name, recipe, folders, out, verify=verify, progress=progress)


def check(name: str, folder: str | Path) -> str:
    """One phrase on ``folder/NAME.npz``: ``whole``, ``not here``, or what is wrong with it."""
    return check_file(Path(folder).expanduser() / f"{name}.npz", RECIPES[choose("data set", name, list(RECIPES))])
