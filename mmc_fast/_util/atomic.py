"""Files that are either whole or not there: written beside their place, synchronised, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = [
    "SaveFailed",
    "read_tensors",
    "save_errors",
    "set_aside",
    "sync_folder",
    "write_file",
    "write_folder",
    "write_json",
    "write_npz",
    "write_tensors",
]


class SaveFailed(RuntimeError):
    """A file could not be written, as on a full disk. The message names what is still there."""


_CHECKSUM = "sha256"
_ASIDE = ".old"


@contextlib.contextmanager
def save_errors(what: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a full disk or a folder that cannot be written into ``SaveFailed``, one line.

    ``kept`` says what is still there; it is asked only after a failure.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise SaveFailed(
            f"{what} could not be written ({reason}); {kept()}; make room or fix the folder, then resume"
        ) from error


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

    An existing folder of that name is set aside first and removed last; :func:`set_aside` finds it after a kill in
    between.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        write(temporary)
        for file in temporary.iterdir():
            _sync_file(file)
        os.chmod(temporary, 0o777 & ~_umask())
        sync_folder(temporary)
        aside = temporary.with_name(f"{temporary.name}{_ASIDE}")
        if path.exists():
            os.replace(path, aside)
        os.replace(temporary, path)
        shutil.rmtree(aside, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def set_aside(folder: Path) -> dict[str, Path]:
    """Folders that :func:`write_folder` had set aside when it was killed: name -> where it is."""
    found = {}
    for path in folder.glob(f".*{_ASIDE}"):
        name = path.name[1:].rsplit(".", 2)[0]  # ".NAME.RANDOM.old"
        if path.is_dir() and not (folder / name).exists():
            found[name] = path
    return found


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
    """Write safetensors with a checksum over content and metadata; tensors may live on any device and share memory."""
    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    about = dict(metadata or {})
    about[_CHECKSUM] = _digest(plain, about)
    write_file(path, lambda p: save_file(plain, p, metadata=about))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; a checksum of :func:`write_tensors` must fit.

    Raises ``OSError``, ``SafetensorError``, or ``ValueError`` where the content does not match its checksum.
    """
    with safe_open(path, framework="pt") as file:
        about = dict(file.metadata() or {})
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stated = about.pop(_CHECKSUM, None)
    if stated is not None and stated != _digest(tensors, about):
        raise ValueError("its content does not match its checksum")
    return tensors, about


def _digest(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name].contiguous()
        digest.update(f"\x1f{name}\x1f{t.dtype}\x1f{list(t.shape)}\x1f".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
