"""What a builder says about itself, and the npz file that it becomes."""

from __future__ import annotations

import hashlib
import json
import tempfile
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmc_fast._util.files import write_file
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.archive import Archive
from mmc_fast.experiments.data.prepare.originals import Originals, Progress

_LARGE = 1 << 26  # bytes; beyond that, compression level 9 costs minutes and saves little


@dataclass(frozen=True)
class Recipe:
    """How one data set is made.

    Attributes:
        where: where the originals are published and under which terms; one line.
        build: all arrays, and what ``meta`` says beside what is added here.
        split: first 16 digits of the SHA-256 of the array ``split``; empty where it depends on the release.
    """

    where: str
    build: Callable[[Originals], tuple[dict[str, np.ndarray], dict[str, Any]]]
    split: str = ""


def prepare_file(
    name: str,
    recipe: Recipe,
    folders: Sequence[str | Path],
    out: str | Path,
    *,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Write ``out/NAME.npz`` from the originals in ``folders``; whole or not at all, the same bytes every time.

    Raises :class:`~mmc_fast.errors.InputError` for originals that are missing, damaged or of another release.
    """
    target = Path(out).expanduser()
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target, prefix=f".{name}.", ignore_cleanup_errors=True) as scratch:
        originals = Originals(name, folders, where=recipe.where, verify=verify, progress=progress, scratch=scratch)
        arrays, meta = recipe.build(originals)
        if verify and recipe.split and _split_digest(arrays) != recipe.split:
            raise InputError(
                f"{name}: NumPy {np.__version__} draws another split than the one of this set; use NumPy 1.24 to 2.4"
            )
        path = target / f"{name}.npz"
        write_file(
            path, lambda temporary: _write(temporary, arrays, {**meta, **_facts(originals, recipe)}, originals.progress)
        )
    return path


def _split_digest(arrays: Mapping[str, np.ndarray]) -> str:
    return hashlib.sha256(arrays["split"].tobytes()).hexdigest()[:16] if "split" in arrays else ""


def _facts(originals: Originals, recipe: Recipe) -> dict[str, Any]:
    """``verified``: compared with the release, by its split and numbers, or by the check sums beside all of its files."""
    compared = bool(recipe.split) or all(originals.used.values())
    return {"originals": dict(sorted(originals.used.items())), "verified": originals.verify and compared}


def _write(path: Path, arrays: Mapping[str, np.ndarray], meta: dict[str, Any], progress: Progress) -> None:
    """An npz file in which nothing depends on the day or the machine; ``meta`` holds a digest of every array."""
    digests = {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for done, (key, array) in enumerate(arrays.items()):
            progress("write", done, len(arrays))
            digests[key] = _digest(array)
            _member(archive, key, array)
        _member(archive, "meta", np.array(json.dumps({**meta, "arrays": digests}, sort_keys=True)))


def _member(archive: zipfile.ZipFile, key: str, array: np.ndarray) -> None:
    entry = zipfile.ZipInfo(f"{key}.npy", date_time=(1980, 1, 1, 0, 0, 0))
    entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
    large = array.nbytes >= _LARGE
    entry._compresslevel = 6 if large else 9  # type: ignore[attr-defined]
    with archive.open(entry, "w", force_zip64=array.nbytes >= 1 << 31) as stream:
        np.lib.format.write_array(stream, np.asanyarray(array, order="C"), version=(1, 0), allow_pickle=False)


def _digest(array: np.ndarray) -> str:
    digest = hashlib.sha256(f"{array.dtype.str} {array.shape} ".encode())
    step = max(1, _LARGE // max(1, array[:1].nbytes)) if array.ndim else 1
    for start in range(0, len(array) if array.ndim else 1, step):
        digest.update(np.ascontiguousarray(array[start : start + step] if array.ndim else array).tobytes())
    return digest.hexdigest()


def check_file(path: str | Path, recipe: Recipe) -> str:
    """One phrase on a prepared file: ``whole``, or what is wrong with it."""
    if not Path(path).is_file():
        return "not here"
    try:
        archive = Archive(path)
        arrays = {key: archive.read(key) for key in archive}
        meta = json.loads(str(arrays.pop("meta")))
        stated = meta.get("arrays", {})
    except (InputError, KeyError, ValueError, AttributeError) as error:
        return f"damaged: {error}"
    wrong = sorted(
        {key for key, array in arrays.items() if key in stated and stated[key] != _digest(array)}
        | (stated.keys() - arrays)
    )
    if wrong:
        return f"damaged: {', '.join(wrong)} not as written; prepare it again"
    if stated and not meta.get("verified"):
        return "whole; made from originals that no check sum verified"
    if recipe.split and _split_digest(arrays) != recipe.split:
        return "whole, but with another split than the set has"
    return "whole" if stated else "readable; holds no check sums, it was not written by `mmc-fast data prepare`"


def dense(*parts: tuple[np.ndarray, Sequence[str]], dtype: Any = np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Columns side by side, and their names."""
    names = [str(name) for _, columns in parts for name in columns]
    return np.concatenate([np.asarray(x, dtype) for x, _ in parts], 1), np.array(names)


def view_arrays(views: Mapping[str, tuple[np.ndarray, Any]]) -> dict[str, np.ndarray]:
    """``x_VIEW`` and ``names_VIEW`` of each."""
    found: dict[str, np.ndarray] = {}
    for view, (values, names) in views.items():
        found |= {f"x_{view}": values, f"names_{view}": np.array(names)}
    return found
