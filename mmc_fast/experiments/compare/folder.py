"""Folders that a command owns: marked by a small file, so that nothing foreign is ever written into."""

from __future__ import annotations

from pathlib import Path

from mmc_fast._util.atomic import write_json
from mmc_fast.errors import InputError

__all__ = ["own_folder"]

SCHEMA_VERSION = 1


def own_folder(out: Path, kind: str) -> None:
    """Make the folder, or take over one that an earlier call marked as a ``kind``.

    Raises InputError where ``out`` is a file or holds something else.
    """
    mark = out / f"{kind}.json"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; choose a folder with --out")
    if out.is_dir() and any(out.iterdir()) and not mark.is_file():
        raise InputError(f"{out} exists and holds no {kind}; choose another folder with --out")
    out.mkdir(parents=True, exist_ok=True)
    if not mark.is_file():
        write_json(mark, {"kind": kind, "schema_version": SCHEMA_VERSION})
