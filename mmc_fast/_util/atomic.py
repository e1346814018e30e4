"""JSON, arrays and tensors in files that are either whole or not there, and what is told where one cannot be written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from .files import write_file


class SaveFailed(RuntimeError):
    """A file could not be written, as on a full disk. The message names what is still there."""


@contextlib.contextmanager
def save_errors(what: Path, kept: Callable[[], str]) -> Iterator[None]:
    """Turn the errors of a full disk or a folder that cannot be written into ``SaveFailed``, one line.

    ``kept`` says what is still there; it is asked only after a failure.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split())
        raise SaveFailed(
            f"{what} could not be written ({reason}); {kept()}; make room or fix the folder, then resume"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON (no NaN: what was not measured is null)."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed npz without pickles."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)

    write_file(path, write)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write safetensors; tensors may live on any device and share memory."""
    from safetensors.torch import save

    plain = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    content = save(plain, metadata=dict(metadata or {}))
    write_file(path, lambda temporary: temporary.write_bytes(content))


def read_tensors(content: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of the content of a safetensors file. Raises ``ValueError`` where it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    return tensors, header.get("__metadata__") or {}
