"""A user's own data in one npz file; the layout is documented in docs/guides/data.md."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mmc_fast._util.names import nearest, unknown
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.archive import Archive
from mmc_fast.experiments.data.dataset import check_selection
from mmc_fast.experiments.data.labels import read_labels
from mmc_fast.experiments.data.raw import RawDataset
from mmc_fast.experiments.data.scratch import Scratch
from mmc_fast.experiments.data.splits import stratified_split
from mmc_fast.experiments.tasks import Classification, Task


def read_npz(
    path: str | Path,
    *,
    task: str | None = None,
    modalities: Sequence[str] | None = None,
    split_seed: int | None = None,
    scratch: Scratch | None = None,
    purpose: str = "training",
    kind: str | None = None,
    known: Task | None = None,
) -> RawDataset:
    """The content of a file in the documented layout; only the arrays that are asked for are read.

    Features that would take more than the budget of ``scratch`` are mapped into memory instead of read. ``purpose``: for
    "scoring" a file without split is all test; for "prediction" labels and split are not looked at. ``kind``: what the labels are, instead of ``meta``; ``known``: the
    task of a finished run.
    Raises :class:`~mmc_fast.errors.InputError` for anything that the layout does not allow.
    """
    archive = Archive(path)
    meta = _meta(archive)
    views = _views(archive, meta)
    target = _target(archive, task) if purpose != "prediction" else "y"
    if modalities is not None:
        if purpose != "training":  # what is not there is absent
            modalities = [name for name in modalities if name in views]
        views = check_selection(modalities, views)
    rows = _check_lengths(archive, views, target)
    labels, read_task = np.zeros(rows, np.int64), known or Classification(("0", "1"))
    if purpose != "prediction":
        labels, read_task = _labels(archive, target, meta, kind, known)
    elif known is not None:
        labels = known.unknown(rows)
    ids = _ids(archive) if "ids" in archive else None
    read = archive.read
    if scratch is not None:
        sizes = [archive.headers[f"x_{view}"] for view in views]
        if sum(math.prod(h.shape) * (h.dtype.itemsize + 4) for h in sizes) > scratch.budget:
            read = functools.partial(archive.map, scratch=scratch)
    return RawDataset(
        name=str(meta.get("name", archive.path.stem)),
        views={view: read(f"x_{view}") for view in views},
        labels=labels,
        split=np.full(rows, 2, np.uint8)
        if purpose == "prediction" or (purpose == "scoring" and "split" not in archive and split_seed is None)
        else _split(archive, read_task.strata(labels), ids, split_seed),
        task=read_task,
        names={view: _names(archive, view) for view in views if f"names_{view}" in archive},
        present={view: _present(archive, view) for view in views if f"present_{view}" in archive},
        ids=ids,
        row_names=None if ids is None else list(map(str, archive.read("ids"))),
        info={
            "task": target.removeprefix("y").removeprefix("_") or str(meta.get("task", "y")),
            "source": str(meta.get("source", "user file")),
            "licence": str(meta.get("licence", "not stated")),
            "variant": None,
            "split": "in the file" if "split" in archive else f"drawn with seed {split_seed}",
            "ignored_arrays": _ignored(archive, views),
        },
    )


def column_names(names: list[str], shape: tuple[int, ...], what: str) -> list[str]:
    """Names of the flattened columns of an array [N, ...]: as given, or per step of a sequence [N, T, F]."""
    width = int(np.prod(shape[1:]))
    if len(names) == width:
        return names
    if len(shape) == 3 and len(names) == shape[2]:
        return [f"{name}@{step}" for step in range(shape[1]) for name in names]
    raise InputError(f"{what} holds {len(names)} names for {width} features; give one per feature, or leave it out.")


def _meta(archive: Archive) -> dict[str, Any]:
    if "meta" not in archive:
        return {}
    header = archive.headers["meta"]
    if header.dtype.kind != "U" or header.shape not in ((), (1,)):
        raise InputError(f"{archive.path}: meta must be one text, got {header.dtype} {list(header.shape)}.")
    try:
        meta = json.loads(archive.read("meta").item())
    except ValueError as error:
        raise InputError(f"{archive.path}: meta is not valid JSON ({error}).") from None
    if not isinstance(meta, dict):
        raise InputError(f"{archive.path}: meta must be a JSON object, got {type(meta).__name__}.")
    return meta


def _views(archive: Archive, meta: dict[str, Any]) -> list[str]:
    found = [key[2:] for key in archive if key.startswith("x_") and len(key) > 2]
    if not found:
        raise InputError(
            f"{archive.path}: no feature array; name one x_VIEW for each modality. Found: {', '.join(archive)}."
        )
    for key in archive:
        for prefix in ("names_", "present_"):
            if key.startswith(prefix) and key.removeprefix(prefix) not in found:
                raise unknown(f"modality in array {key!r} of {archive.path}:", key.removeprefix(prefix), found)
    for view in found:
        header = archive.headers[f"x_{view}"]
        if header.dtype.kind not in "biuf" or not header.shape or 0 in header.shape[1:]:
            raise InputError(
                f"{archive.path}: x_{view} must hold numbers in shape [N, d] (or [N, T, d]) with d >= 1, "
                f"got {header.dtype} {list(header.shape)}."
            )
    order = meta.get("views")
    if order is None:
        return found
    if not isinstance(order, list) or not order:
        raise InputError(f"{archive.path}: meta: views must be a list of modality names, got {order!r}.")
    for view in order:
        if view not in found:
            raise unknown(f"modality in meta views of {archive.path}:", view, found)
    if len(set(order)) != len(order):
        raise InputError(f"{archive.path}: meta: views names a modality twice: {', '.join(order)}.")
    return order


def _target(archive: Archive, task: str | None) -> str:
    tasks = [key for key in archive if key == "y" or (key.startswith("y_") and len(key) > 2)]
    if not tasks:
        raise InputError(f"{archive.path}: no labels; name them y (or y_TASK). Found: {', '.join(archive)}.")
    if task is not None:
        if f"y_{task}" not in archive:
            raise unknown("task", task, [key[2:] for key in tasks if key != "y"] or ["(none: the labels are y)"])
        return f"y_{task}"
    if "y" not in tasks and len(tasks) > 1:
        raise InputError(
            f"{archive.path}: several tasks and none chosen. Allowed: {', '.join(key[2:] for key in tasks)}."
        )
    return "y" if "y" in tasks else tasks[0]


def _check_lengths(archive: Archive, views: list[str], target: str) -> int:
    rows = archive.headers[f"x_{views[0]}"].shape[0]
    if rows == 0:
        raise InputError(f"{archive.path}: x_{views[0]} has no rows.")
    flat = [target, "split", "ids", *(f"present_{view}" for view in views)]
    for key in [*(f"x_{view}" for view in views), *(key for key in flat if key in archive)]:
        shape = archive.headers[key].shape
        if key in flat and len(shape) != 1 and not (key == target and len(shape) == 2):
            raise InputError(f"{archive.path}: {key} must have shape [{rows}], got {list(shape)}.")
        if shape[0] != rows:
            raise InputError(
                f"{archive.path}: {key} has {shape[0]} rows and x_{views[0]} has {rows}; give one per sample."
            )
    return int(rows)


def _labels(
    archive: Archive, target: str, meta: dict[str, Any], kind: str | None, known: Task | None
) -> tuple[np.ndarray, Task]:
    """Labels by the rules of tables; ``num_classes`` of ``meta`` says that they number classes from 0."""
    y, where, number = archive.read(target), str(archive.path), meta.get("num_classes")
    names = meta.get("classes")
    if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
        raise InputError(f"{where}: meta: num_classes must be an integer, got {number!r}.")
    if names is not None and not (isinstance(names, list) and names and all(isinstance(n, str) for n in names)):
        raise InputError(f"{where}: meta: classes must be a list of names, got {names!r}.")
    kind = kind or meta.get("kind")
    columns = (
        {target: y}
        if y.ndim == 1
        else {(names or [])[j] if j < len(names or []) else f"{target}_{j}": c for j, c in enumerate(y.T)}
    )
    if known is None and y.ndim == 1 and y.dtype.kind in "iubf" and (number or names):
        counted = Classification(tuple(names)) if names else Classification.of(min(number or 0, len(y)))
        known = replace(counted, main=str(meta.get("metric", "")))
        return _numbered(y, where, target, len(known.names)), known
    if known is not None and isinstance(known, Classification) and y.dtype.kind in "iubf" and y.ndim == 1 and names:
        y = np.array(names)[_numbered(y, where, target, len(names))]
        columns = {target: y}
    labels, task = read_labels(columns, kind, where, "row {}".format, known)
    if known is None and isinstance(task, Classification):
        task = replace(task, main=str(meta.get("metric", "")))
    return labels, task


def _numbered(y: np.ndarray, where: str, target: str, classes: int) -> np.ndarray:
    """Class numbers as int64; InputError for what is none."""
    bad = ~np.isin(y, np.arange(classes))
    if bad.any():
        row = int(bad.argmax())
        raise InputError(
            f"{where}: {target} is {y[row]} in row {row}, out of range; meta names {classes} classes, which are numbered "
            f"0 to {classes - 1}."
        )
    return y.astype(np.int64)


def _ids(archive: Archive) -> np.ndarray:
    ids = archive.read("ids")
    if ids.dtype.kind == "U":
        return np.unique(ids, return_inverse=True)[1].astype(np.int64)
    if ids.dtype.kind not in "iu":
        raise InputError(f"{archive.path}: ids must be integers or text, got {ids.dtype}.")
    return ids.astype(np.int64)


def _split(archive: Archive, labels: np.ndarray, ids: np.ndarray | None, seed: int | None) -> np.ndarray:
    if "split" not in archive:
        if seed is None:
            raise InputError(
                f"{archive.path}: no split; add `split` (0 train, 1 validation, 2 test) or have it drawn: split_seed=0."
            )
        return stratified_split(labels, seed=seed, ids=ids)
    if seed is not None:
        raise InputError(f"{archive.path}: the file has a split; leave split_seed out, or `split` out of the file.")
    split = archive.read("split")
    known = np.isin(split, (0, 1, 2)) if split.dtype.kind in "iu" else np.zeros(len(split), bool)
    if not known.all():
        row = int(np.flatnonzero(~known)[0])
        raise InputError(
            f"{archive.path}: split is {str(split[row])!r} ({split.dtype}) in row {row}; "
            "allowed are the integers 0 train, 1 validation, 2 test."
        )
    return split.astype(np.uint8)


def _names(archive: Archive, view: str) -> list[str]:
    return column_names(
        archive.text(f"names_{view}"), archive.headers[f"x_{view}"].shape, f"{archive.path}: names_{view}"
    )


def _present(archive: Archive, view: str) -> np.ndarray:
    dtype = archive.headers[f"present_{view}"].dtype
    if dtype != np.bool_:
        raise InputError(f"{archive.path}: present_{view} must be bool, got {dtype}; store it with .astype(bool).")
    return archive.read(f"present_{view}")


def _ignored(archive: Archive, views: list[str]) -> list[str]:
    """Arrays outside of the layout; one whose name is nearly that of the layout is refused as a slip."""
    layout = ["split", "ids", "meta", *(f"{p}_{view}" for view in views for p in ("names", "present"))]
    prefixes = ("x_", "y_", "names_", "present_")
    others = [k for k in archive if k not in layout and k != "y" and not k.startswith(prefixes)]
    for key in others:
        guess = nearest(key, layout)
        if guess is not None and guess not in archive:
            raise InputError(
                f"{archive.path}: unknown array {key!r}; did you mean {guess!r}? Rename it or leave it out."
            )
    return others
