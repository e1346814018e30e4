"""Files that are either whole or not there: written beside their place, synchronised, then renamed."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["sync_folder", "write_file", "write_folder", "write_json", "write_npz", "write_tensors"]


def sync_folder(path: Path) -> None:
    """Flush a folder entry to disk, so that a rename survives a power cut (no-op where folders cannot be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary path in the same folder, then rename the file to ``path``."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        _sync_file(temporary)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Call ``write`` with a temporary folder beside ``path``, synchronise its files, then rename it to ``path``.

    An existing folder of that name is set aside first and removed last.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        write(temporary)
        for file in temporary.iterdir():
            _sync_file(file)
        os.chmod(temporary, 0o777 & ~_umask())
        sync_folder(temporary)
        aside = temporary.with_name(f"{temporary.name}.old")
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON (no NaN: what was not measured is null)."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed npz without pickles."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    write_file(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write safetensors; tensors may live on any device and share memory."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    write_file(path, lambda p: save_file(plain, p, metadata=metadata))


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
