"""Find ``mmc_fast.kernels`` in a source tree, where its files lie in ``kernels/`` beside the package."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path


class _KernelsFinder(importlib.abc.MetaPathFinder):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname, path=None, target=None):
        if fullname != "mmc_fast.kernels":
            return None
        locations = [str(self.folder)]
        return importlib.util.spec_from_file_location(
            fullname, self.folder / "__init__.py", submodule_search_locations=locations
        )


def install_finder(folder: Path) -> None:
    """Find ``mmc_fast.kernels`` in ``folder`` of a source tree, before an editable installation of another tree does."""
    if (folder / "__init__.py").is_file() and (folder.parent / "pyproject.toml").is_file():
        sys.meta_path.insert(0, _KernelsFinder(folder))
