"""Tables to a data set: which column belongs to what, rows joined by id, labels named, a split stated or drawn."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmc_fast._util.extras import require
from mmc_fast._util.names import unknown
from mmc_fast._util.numbers import check_seed
from mmc_fast._util.toml import read_toml
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.cells import as_text
from mmc_fast.experiments.data.dataset import PARTS, MultimodalDataset
from mmc_fast.experiments.data.labels import read_labels
from mmc_fast.experiments.data.preprocessing import Preprocessing, encoded_names
from mmc_fast.experiments.data.raw import RawDataset, build
from mmc_fast.experiments.data.splits import stratified_split
from mmc_fast.experiments.data.tables import ENDINGS, encode, fit_categories, place, read_table
from mmc_fast.experiments.tasks import KINDS, Classification

_PART_NAMES = {"train": 0, "validation": 1, "val": 1, "valid": 1, "test": 2, "0": 0, "1": 1, "2": 2}


@dataclass(frozen=True)
class ColumnMap:
    """What the columns of tables are for.

    ``label``: a column, or several. ``id``: joins tables and names rows; rows of one
    table that share it stay in one part. ``group``: instead of ``id``, what must stay in one part. ``split``: a column
    with train, validation, test (or 0, 1, 2); without it the split is drawn with ``split_seed``. ``modalities``: name ->
    columns; a table alone needs it, and of several tables each is a modality with all columns that are left.
    ``categorical``: columns of numbers that are codes. ``kind``: what the labels are, where it is not clear:
    "classification", "multilabel", "regression" or "survival" (``label``: time and event).
    """

    label: str | Sequence[str] | None = None
    id: str | None = None
    group: str | None = None
    split: str | None = None
    split_seed: int = 0
    modalities: Mapping[str, Sequence[str]] = field(default_factory=dict)
    categorical: Sequence[str] = ()
    kind: str | None = None
    nan_policy: str = "indicator"

    @classmethod
    def parse(cls, values: Mapping[str, Any], where: str) -> ColumnMap:
        """From a table of settings such as a TOML file; InputError names what is wrong."""
        known = [f.name for f in fields(cls)]
        for key in values:
            if key not in known:
                raise unknown(f"key of {where}:", key, known)
        for key in ("id", "group", "split", "kind", "nan_policy"):
            if values.get(key) is not None and not isinstance(values[key], str):
                raise InputError(f"{where}: {key} is {values[key]!r}; give a text.")
        lists = dict(values.get("modalities") or {}) | {"categorical": values.get("categorical", [])}
        if not isinstance(values.get("label", ""), str):
            lists["label"] = values["label"]
        for key, names in lists.items():
            if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
                raise InputError(f"{where}: {key} is {names!r}; give a list of columns.")
        if values.get("kind") is not None and values["kind"] not in KINDS:
            raise unknown(f"kind in {where}:", values["kind"], tuple(KINDS))
        return cls(**values)

    @property
    def labels(self) -> list[str]:
        """The label columns."""
        return [self.label] if isinstance(self.label, str) else list(self.label or ())

    @property
    def roles(self) -> list[str]:
        """Columns that are no features."""
        return [c for c in (*self.labels, self.id, self.group, self.split) if c is not None]


def read_tables(
    path: Path,
    columns: Mapping[str, Any] | str | Path | None,
    *,
    split_seed: int | None = None,
    preprocessing: Preprocessing | None = None,
    purpose: str = "training",
    kind: str | None = None,
) -> RawDataset:
    """One table with a column map, or a folder with one table for each modality.

    ``columns``: the map, or a TOML file that holds it; None: ``NAME.toml`` beside ``NAME.csv``, ``columns.toml`` in the
    folder, or the roles in the tables of the run. Raises InputError.
    """
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in ENDINGS and not p.name.startswith("."))
        if not files:
            raise InputError(f"{path}: no table in this folder; allowed are {', '.join(ENDINGS)}.")
        twice = next((p for p, q in zip(files[1:], files, strict=False) if p.stem == q.stem), None)
        if twice is not None:
            raise InputError(f"{path}: two tables are called {twice.stem}; keep one.")
        beside = path / "columns.toml"
    else:
        files, beside = [path], path.with_suffix(".toml")
    given, where = columns, "columns"
    if given is None and beside.is_file():
        given = beside
    if isinstance(given, str | Path):
        where, given = str(given), read_toml(Path(given))
    if given is None and preprocessing is None:
        raise InputError(
            f"{path}: which columns are features and which is the label? Write {beside} (docs/guides/data.md)."
        )
    stored = {} if preprocessing is None else preprocessing.source
    roles = ColumnMap.parse({k: v for k, v in stored.items() if k != "kind"} | dict(given or {}), where)
    tables = {p.stem: read_table(p) for p in files}
    if split_seed is not None:
        if roles.split and (purpose == "training" or any(roles.split in t.columns for t in tables.values())):
            raise InputError(f"{path}: column {roles.split!r} holds the split; leave split_seed out.")
        roles = replace(roles, split_seed=split_seed)
    if kind is not None:
        roles = replace(roles, kind=kind)
    if not path.is_dir():
        return read_frames(
            tables, roles, name=path.stem, paths={path.stem: path}, preprocessing=preprocessing, purpose=purpose,
            drawn=split_seed is not None,
        )  # fmt: skip
    return read_frames(
        tables, roles, name=path.name, paths={p.stem: p for p in files}, preprocessing=preprocessing, purpose=purpose,
        several=True, drawn=split_seed is not None,
    )  # fmt: skip


def read_frames(
    frames: Mapping[str, Any],
    roles: ColumnMap,
    *,
    name: str = "frames",
    paths: Mapping[str, Path] | None = None,
    preprocessing: Preprocessing | None = None,
    purpose: str = "training",
    several: bool = False,
    drawn: bool = False,
) -> RawDataset:
    """The tables as one set of rows. ``several``: each table is a modality; otherwise the one table holds all of them.

    Rows are put in the order of their ids, so that none of the results depends on the order in the files. ``drawn``: a
    split is drawn also for scoring, where otherwise all rows without one are test rows. Raises InputError.
    """
    where = {key: str((paths or {}).get(key, f"table {key!r}")) for key in frames}
    table = f"{name} (all tables)" if several else next(iter(where.values()))
    about, parts = _joined(frames, roles, where, purpose) if several else _single(frames, roles, where, preprocessing)
    if purpose != "prediction" and not roles.labels:
        raise InputError(f"{table}: which column is the label? Name it as label.")
    needed = [c for c in roles.roles if purpose == "training" or (purpose == "scoring" and c in roles.labels)]
    for column in needed:
        if column not in about.columns:
            raise unknown(f"column of {table}:", column, list({str(c): 0 for f in frames.values() for c in f.columns}))
    info: dict[str, Any] = {
        "task": "+".join(roles.labels),
        "variant": None,
        "source": "tables",
        "licence": "not stated",
    }
    if several and purpose != "prediction":
        about, parts, info["rows_without_label"] = _labelled(about, parts, roles, table)
    rows, known = len(about), {} if preprocessing is None else preprocessing.views
    at = partial(place, about)
    row_names = _ids(about[roles.id], str(roles.id), table, at) if roles.id in about.columns else None
    group = _ids(about[roles.group], str(roles.group), table, at) if roles.group in about.columns else row_names
    ids = None if group is None else np.unique(np.array(group), return_inverse=True)[1].astype(np.int64)
    task = None if preprocessing is None else preprocessing.task
    split = np.full(rows, 2, np.uint8)
    info["split"] = "all test"
    if purpose != "prediction":
        cells = {c: about[c] for c in roles.labels}
        labels, task = read_labels(cells, roles.kind, table, at, task)
        if roles.split in about.columns:
            split, info["split"] = _split(about[roles.split], str(roles.split), table, at), "in the table"
        elif purpose == "training" or drawn:
            split = stratified_split(task.strata(labels), seed=roles.split_seed, ids=ids)
            info["split"] = f"drawn with seed {roles.split_seed}"
    else:
        task = task or Classification.of(2)
        labels = task.unknown(rows)
    views, names, columns, categories = {}, {}, {}, {}
    differ: dict[str, Any] = {"new_modalities": [], "new_columns": {}, "missing_columns": {}, "unknown_categories": {}}
    for view, part in parts.items():
        file, own = where.get(view, table), [str(c) for c in part.columns]
        if preprocessing is None:
            columns[view] = own
            categories[view] = fit_categories(part, own, split == 0, roles.categorical, file)
            views[view], _ = encode(part, own, categories[view], file)
            names[view] = encoded_names(own, categories[view])
        elif view not in known:
            differ["new_modalities"].append(view)
        elif set(own) & set(known[view].columns):
            views[view], strange = encode(part, known[view].columns, known[view].categories, file)
            names[view] = known[view].names
            for key, found in (
                ("new_columns", [c for c in own if c not in known[view].columns]),
                ("missing_columns", [c for c in known[view].columns if c not in own]),
                ("unknown_categories", strange),
            ):
                if found:
                    differ[key][view] = found
        else:
            differ["new_columns"][view] = own
    source = {f.name: getattr(roles, f.name) for f in fields(roles) if f.name not in ("modalities", "split_seed")}
    return RawDataset(
        name=name,
        views=views,
        labels=labels,
        split=split,
        task=task,
        names=names,
        ids=ids,
        nan_policy=roles.nan_policy,
        info=info | ({} if preprocessing is None else {"differences": differ}),
        columns=columns,
        categories=categories,
        source={k: v if isinstance(v, str) else list(v) for k, v in source.items() if v is not None},
        row_names=row_names,
    )


def _single(
    frames: Mapping[str, Any], roles: ColumnMap, where: Mapping[str, str], preprocessing: Preprocessing | None
) -> tuple[Any, dict[str, Any]]:
    """Roles and modalities of one table, in the order of its ids."""
    (key, frame), *more = frames.items()
    if more:
        raise InputError(f"{', '.join(where.values())}: a column map with modalities is for one table.")
    frame = frame.reset_index(drop=True)
    if roles.id in frame.columns:
        frame = frame.iloc[_order(_ids(frame[roles.id], str(roles.id), where[key], partial(place, frame)))]
    about = frame[[c for c in roles.roles if c in frame.columns]]
    if preprocessing is not None:
        views = {view: [c for c in known.columns if c in frame.columns] for view, known in preprocessing.views.items()}
        used = {c for columns in views.values() for c in columns} | set(about.columns)
        parts = {view: frame[columns] for view, columns in views.items() if columns}
        strange = [c for c in frame.columns if c not in used]
        if strange and parts:
            first = next(iter(parts))
            parts[first] = frame[[*views[first], *strange]]  # told as new columns
        return about, parts
    if not roles.modalities:
        raise InputError(
            f"{where[key]}: which columns belong to which modality? Add [modalities] with NAME = [columns] to the map."
        )
    parts = {}
    for view, columns in roles.modalities.items():
        for c in columns:
            if c not in frame.columns:
                raise unknown(f"column of modality {view!r} in {where[key]}:", c, [str(x) for x in frame.columns])
            if c in roles.roles:
                raise InputError(f"{where[key]}: column {c!r} of modality {view!r} is label, id, group or split too.")
        parts[view] = frame[list(columns)]
    return about, parts


def _joined(
    frames: Mapping[str, Any], roles: ColumnMap, where: Mapping[str, str], purpose: str
) -> tuple[Any, dict[str, Any]]:
    """Roles and modalities of several tables, one row for each id that any of them has."""
    pandas = require("pandas", extra="experiments")
    if roles.id is None:
        raise InputError(f"{', '.join(where.values())}: several tables are joined by a column; name it as id.")
    indexed = {}
    for key, frame in frames.items():
        if roles.id not in frame.columns:
            raise unknown(f"id column in {where[key]}:", roles.id, [str(c) for c in frame.columns])
        ids = _ids(frame[roles.id], roles.id, where[key], partial(place, frame))
        twice = next((i for i, n in zip(*np.unique(ids, return_counts=True), strict=True) if n > 1), None)
        if twice is not None:
            raise InputError(
                f"{where[key]}: id {str(twice)!r} has several rows; tables are joined one row an id: aggregate the rows, "
                "or give each row an id of its own and name what they share as group."
            )
        indexed[key] = frame.drop(columns=[roles.id]).set_axis(ids, axis=0)
    everyone = [i for frame in indexed.values() for i in frame.index]
    base = [everyone[i] for i in _order(everyone)]
    base = list(dict.fromkeys(base))
    about = pandas.DataFrame({roles.id: base}, index=base)
    parts = {}
    for key, frame in indexed.items():
        for column in roles.roles:
            if column not in frame.columns:
                continue
            here = frame[column].reindex(base)
            if column in about.columns:
                old, new = as_text(about[column]), as_text(here)
                for row, (x, y) in enumerate(zip(old, new, strict=True)):
                    if x is not None and y is not None and x != y:
                        raise InputError(
                            f"{where[key]}: column {column!r} is {y!r} for id {base[row]!r} and {x!r} in another table; "
                            "keep it in one table."
                        )
                here = about[column].where(about[column].notna(), here)
            about[column] = here
        features = [c for c in frame.columns if c not in roles.roles]
        if features:
            parts[key] = frame[features].reindex(base).rename_axis(roles.id)
    if roles.modalities:
        raise InputError("columns: modalities are for one table; in a folder each table is a modality.")
    return about.rename_axis(roles.id), parts


def _order(ids: Sequence[str]) -> np.ndarray:
    """Rows in the order of their ids: numbers by value, else text."""
    if all(i.isdigit() for i in ids):
        return np.array(sorted(range(len(ids)), key=lambda i: (int(ids[i]), ids[i])), np.int64)
    return np.array(sorted(range(len(ids)), key=lambda i: ids[i]), np.int64)


def _ids(cells: Any, column: str, where: str, at: Callable[[int], str]) -> list[str]:
    found = as_text(cells)
    empty = next((row for row, i in enumerate(found) if i is None), None)
    if empty is not None:
        raise InputError(f"{where}: column {column!r} is empty in {at(empty)}; every row needs one.")
    return [str(i) for i in found]


def _labelled(about: Any, parts: dict[str, Any], roles: ColumnMap, table: str) -> tuple[Any, dict[str, Any], int]:
    """Without the rows that have no label at all, which are told in a warning: a table may cover more than the labels."""
    here = about[roles.labels].notna().any(axis=1).to_numpy()
    lost = int((~here).sum())
    if lost == len(here):
        raise InputError(f"{table}: no row has a label; is {', '.join(roles.labels)} the right column?")
    if lost:
        first = as_text(about[roles.id])[int(np.flatnonzero(~here)[0])]
        warnings.warn(f"{table}: {lost} id(s) have no label and are left out, the first is {first!r}", stacklevel=2)
    keep = {view: part[here] for view, part in parts.items()}
    return about[here], keep, lost


def _split(cells: Any, column: str, table: str, at: Callable[[int], str]) -> np.ndarray:
    text = as_text(cells)
    for row, t in enumerate(text):
        if str(t).lower() not in _PART_NAMES:
            raise InputError(
                f"{table}: column {column!r} is {t!r} in {at(row)}; allowed are {', '.join(PARTS)} (or 0, 1, 2)."
            )
    return np.array([_PART_NAMES[str(t).lower()] for t in text], np.uint8)


def from_frames(frames: Any, roles: Mapping[str, Any], split: str | int, name: str, **how: Any) -> MultimodalDataset:
    """:meth:`MultimodalDataset.from_frames`; ``how``: arguments of :func:`build`."""
    where = {"split": split} if isinstance(split, str) else {"split_seed": check_seed(split)}
    columns = ColumnMap.parse({**roles, **where}, "from_frames")
    several = isinstance(frames, Mapping)
    return build(read_frames(dict(frames) if several else {name: frames}, columns, name=name, several=several), **how)


def from_arrays(
    arrays: Mapping[str, Any],
    label: Any,
    id: Any,
    split: Any,
    names: Mapping[str, Sequence[str]],
    present: Mapping[str, Any],
    name: str,
    kind: str | None,
    **how: Any,
) -> MultimodalDataset:
    """:meth:`MultimodalDataset.from_arrays`; ``how``: arguments of :func:`build`."""
    target = np.asarray(label)
    if target.ndim not in (1, 2) or 0 in target.shape:
        raise InputError(f"{name}: label has shape {list(target.shape)}; give [N], or [N, C] for several columns.")
    rows = len(target)
    cells = {"label": target} if target.ndim == 1 else {f"label {j}": c for j, c in enumerate(target.T)}
    views, given = {}, {"id": id, **{f"present {v}": p for v, p in present.items()}}
    for view, x in arrays.items():
        values = np.asarray(x)
        if values.ndim < 2 or values.dtype.kind not in "biuf" or 0 in values.shape[1:]:
            raise InputError(
                f"{name}: modality {view!r} must hold numbers in shape [N, d], got {values.dtype} {list(values.shape)}."
            )
        views[view] = values
    if not isinstance(split, int | np.integer):
        given["split"] = split
    for key, x in (views | {k: v for k, v in given.items() if v is not None}).items():
        if len(x) != rows:
            raise InputError(f"{name}: {key} has {len(x)} rows and the label has {rows}; give one for each row.")
    for view in [*names, *present]:
        if view not in views:
            raise unknown(f"modality of {name}:", view, list(views))
    for view, own in names.items():
        if len(own) != views[view][0].size or len(set(own)) != len(own):
            raise InputError(
                f"{name}: modality {view!r} has {views[view][0].size} columns; give each a name of its own."
            )
    labels, task = read_labels(cells, kind, name, "row {}".format)
    row_names = None if id is None else _ids(np.asarray(id), "id", name, "row {}".format)
    ids = None if row_names is None else np.unique(np.array(row_names), return_inverse=True)[1].astype(np.int64)
    if "split" in given:
        parts = _split(np.asarray(split), "split", name, "row {}".format)
    else:
        parts = stratified_split(task.strata(labels), seed=int(split), ids=ids)
    raw = RawDataset(
        name=name,
        views=views,
        labels=labels,
        split=parts,
        task=task,
        names={view: list(own) for view, own in names.items()},
        present={view: np.asarray(here, bool) for view, here in present.items()},
        ids=ids,
        info={"task": "label", "variant": None, "source": "arrays", "licence": "not stated"},
        row_names=row_names,
    )
    return build(raw, **how)


def from_memory(data: Any, preprocessing: Preprocessing, purpose: str) -> RawDataset:
    """A pandas table, or a mapping from modality to table or array, for a finished run. Raises InputError."""
    pandas = require("pandas", extra="experiments")
    roles = ColumnMap.parse(preprocessing.source, "the run")
    if isinstance(data, pandas.DataFrame):
        return read_frames({"data": data}, roles, name="data", preprocessing=preprocessing, purpose=purpose)
    if not isinstance(data, Mapping) or not data:
        raise TypeError(
            f"give a path, a table, or a mapping from modality to table or array, got {type(data).__name__}."
        )
    if all(isinstance(x, pandas.DataFrame) for x in data.values()):
        return read_frames(data, roles, name="data", preprocessing=preprocessing, purpose=purpose, several=True)
    if purpose != "prediction":
        raise InputError("arrays hold no labels; use predict, or make a data set with from_arrays.")
    views = {str(view): np.asarray(x) for view, x in data.items()}
    rows = {len(x) for x in views.values()}
    if len(rows) != 1 or any(x.ndim < 2 or x.dtype.kind not in "biuf" for x in views.values()):
        shapes = {view: f"{x.dtype} {list(x.shape)}" for view, x in views.items()}
        raise InputError(f"data: give arrays of numbers [N, d] with one N, got {shapes}.")
    n = rows.pop()
    task = preprocessing.task
    return RawDataset("data", views, task.unknown(n), np.full(n, 2, np.uint8), task)
