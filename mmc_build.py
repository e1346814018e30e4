"""Build backend on top of setuptools (PEP 517), used through ``backend-path``.

Adds one thing: it finds the torch of the target environment by its files, also from inside an isolated build, so that
isolation does not install torch a second time, and asks for build tools only where they are missing.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import sys
import sysconfig
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # the hooks that stay as they are
    build_editable,
    build_sdist,
    build_wheel,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "native_wanted",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "torch_dir",
]

_OLDEST_TORCH = (2, 10)
_TOOLS = {"cmake": "cmake>=3.18", "ninja": "ninja>=1.10"}


def torch_dir() -> Path | None:
    """Folder of a torch 2.10 or newer: ``MMC_TORCH_DIR``, else that of the target environment, else of ``sys.path``."""
    named = os.environ.get("MMC_TORCH_DIR")
    if named:
        if not _torch_version(Path(named)):
            raise RuntimeError(
                f"MMC_TORCH_DIR={named} holds no torch package; name the folder with version.py and include/"
            )
        return Path(named)
    base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
    places = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
    places += [sysconfig.get_path("platlib", vars=base), site.getusersitepackages()]
    for place in places:
        folder = Path(place or ".") / "torch"
        version = _torch_version(folder)
        if version >= _OLDEST_TORCH and (folder / "include/torch/csrc/stable/library.h").exists():
            return folder
    return None


def compiler() -> str | None:
    """The C++ compiler that CMake would take, None where there is none."""
    named = os.environ.get("CXX")
    return (
        shutil.which(named.split()[0])
        if named
        else next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    )


def native_wanted() -> bool:
    """Whether to build the native library: ``MMC_BUILD=0`` never, ``1`` always, else where a C++ compiler is found."""
    choice = os.environ.get("MMC_BUILD", "auto") or "auto"
    if choice not in ("0", "1", "auto"):
        raise RuntimeError(f"MMC_BUILD={choice}; allowed are 0 (pure Python), 1 (must be built) and auto")
    if choice == "1" and compiler() is None:
        raise RuntimeError("MMC_BUILD=1 but no C++ compiler was found; install one (g++ or clang++) or set CXX")
    return choice != "0" and compiler() is not None


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """Build requirements beside setuptools: nothing for a pure Python build."""
    needed = list(_setuptools.get_requires_for_build_wheel(config_settings))
    if not native_wanted():
        return needed
    needed += ["pybind11>=2.12"] + [spec for tool, spec in _TOOLS.items() if shutil.which(tool) is None]
    if torch_dir() is None:
        needed.append("torch>=2.10")
    return needed


get_requires_for_build_editable = get_requires_for_build_wheel


def get_requires_for_build_sdist(config_settings: dict | None = None) -> list[str]:
    """A source distribution needs setuptools alone."""
    return []


def _torch_version(folder: Path) -> tuple[int, ...]:
    """Release of an installed torch, read as text: importing it takes seconds and may fail inside isolation."""
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return ()
    found = re.search(r"__version__\s*=\s*['\"](\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else ()
