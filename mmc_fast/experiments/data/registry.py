"""Names of the data sets, what each is, and the one function that loads any of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmc_fast._util.files import user_path
from mmc_fast._util.names import choose, nearest
from mmc_fast._util.numbers import check_seed
from mmc_fast.errors import InputError
from mmc_fast.experiments.data.dataset import MultimodalDataset, check_selection
from mmc_fast.experiments.data.frames import from_memory, read_tables
from mmc_fast.experiments.data.info import DatasetInfo, Entry, find, how_to_get
from mmc_fast.experiments.data.npz import read_npz
from mmc_fast.experiments.data.preprocessing import Preprocessing
from mmc_fast.experiments.data.raw import RawDataset, build
from mmc_fast.experiments.data.scaler import NAN_POLICIES
from mmc_fast.experiments.data.scratch import Scratch, budget_bytes
from mmc_fast.experiments.data.sets import ENTRIES
from mmc_fast.experiments.data.tables import ENDINGS
from mmc_fast.experiments.tasks import KINDS

_ENTRIES: dict[str, Entry] = {entry[0].name: entry for entry in ENTRIES}


def available() -> list[DatasetInfo]:
    """Every data set of the registry; ``found`` says which can be loaded here."""
    return [replace(info, found=find(info.name) is not None) for info, _ in _ENTRIES.values()]


def load(
    name_or_path: Any,
    *,
    task: str | None = None,
    variant: str | None = None,
    nan_policy: str | None = None,
    standardise: bool = True,
    modalities: Sequence[str] | None = None,
    split_seed: int | None = None,
    memory_budget: int | str | None = None,
    scratch: str | Path | None = None,
    preprocessing: Preprocessing | None = None,
    purpose: str | None = None,
    columns: Mapping[str, Any] | str | Path | None = None,
    kind: str | None = None,
) -> MultimodalDataset:
    """A data set of the registry by name, or a user's own data: an npz file, a table, or a folder of tables, by path.

    Args:
        name_or_path: a name of :func:`available`, or a path (a ``Path``, or text that ends in ``.npz`` or has a
            folder in it) to an npz file in the layout of docs/guides/data.md, a table (csv, tsv, parquet, feather), or a
            folder with one table for each modality. With ``preprocessing`` also a pandas table, or a mapping from
            modality to table or array.
        task: which labels; None = the first of the registry, or ``y`` of the file.
        variant: which form of the set, for sets that have several.
        nan_policy: ``"error"``, ``"mean"`` or ``"indicator"``; None = the default of the source (``"error"`` for
            files, ``"indicator"`` for the clinical sets).
        standardise: zero mean and unit variance over the present training rows.
        modalities: load these only; training rows with none of them are dropped.
        split_seed: for a file without ``split``: draw a stratified 60/10/30 split with this seed.
        memory_budget: for a file: bytes (or ``"2GB"``) that its features may take in memory. Larger ones are
            standardised piece by piece into a file that is mapped into memory; the rows are then in the order train,
            validation, test.
        scratch: folder of that file, on a disk with room for the features; None = the system's temporary folder.
        preprocessing: of a finished run (``load_run(folder).preprocessing``), used instead of statistics of these rows.
        purpose: what the data set is for, "training", "scoring" or "prediction"; None = "scoring" with
            ``preprocessing``, else "training".
        columns: what the columns of tables are for, as a mapping or a TOML file; None = the TOML file beside them.
        kind: what the labels of a file are, where they do not tell: "classification", "multilabel", "regression" or "survival".

    Returns:
        A checked :class:`~mmc_fast.experiments.data.MultimodalDataset`.

    Raises:
        InputError: an unknown name, task or variant, a missing file, or data that cannot be used; one line.

    Examples:
        >>> mmc_fast.experiments.data.load("mfeat", modalities=["pix", "fou"]).dims
        {'fou': 76, 'pix': 240}
    """
    purpose = purpose or ("training" if preprocessing is None else "scoring")
    name_or_path = _placed(name_or_path)
    if not isinstance(name_or_path, str | Path) and preprocessing is not None:
        return build(from_memory(name_or_path, preprocessing, purpose), preprocessing=preprocessing, purpose=purpose)
    options = {"task": task, "variant": variant, "nan_policy": nan_policy, "split_seed": split_seed, "kind": kind}
    check_options(name_or_path, **options, memory_budget=memory_budget, columns=columns)
    room = None if memory_budget is None else Scratch(budget_bytes(memory_budget), scratch)
    if scratch is not None and room is None:
        raise InputError("scratch is the folder of data that exceed a memory_budget; give one, such as 2GB")
    if is_table(name_or_path):
        raw = read_tables(
            Path(name_or_path), columns, split_seed=split_seed, preprocessing=preprocessing, purpose=purpose, kind=kind
        )
        if modalities is not None:
            wanted = check_selection(modalities, list(raw.views))
            raw = replace(raw, views={view: raw.views[view] for view in wanted})
    elif isinstance(name_or_path, Path) or _is_path(name_or_path):
        raw = read_npz(
            name_or_path, task=task, modalities=modalities, split_seed=split_seed, scratch=room, purpose=purpose,
            kind=kind, known=None if preprocessing is None else preprocessing.task,
        )  # fmt: skip
    else:
        raw = _load_registered(name_or_path, task, variant, modalities)
    return build(
        raw,
        nan_policy=nan_policy,
        standardise=standardise,
        drop_empty=modalities is not None,
        scratch=room,
        preprocessing=preprocessing,
        purpose=purpose,
    )


_REFUSED = {
    "table": {
        "task": "it is for npz files; leave it out for tables (their label is a column).",
        "memory_budget": "it is for npz files; leave it out for tables (their label is a column).",
        "variant": "a file has no variants; leave it out.",
    },
    "npz file": {
        "columns": "they are for tables, and this is none; leave it out.",
        "variant": "a file has no variants; leave it out.",
    },
    "set": {
        "columns": "they are for tables, and this is none; leave it out.",
        "memory_budget": "it is for npz files, and this set is small; leave it out.",
        "split_seed": "the set has a fixed split; leave it out.",
        "kind": "it is for files, and the labels of this set are known; leave it out.",
    },
}
"""What data come from -> options that have no meaning there, and why."""


def check_options(name_or_path: str | Path, **options: Any) -> None:
    """Refuse options of :func:`load` that are wrong whether or not the data are here; no file is looked for.

    Raises InputError; ``modalities``, and the ``task`` of a file, are left to :func:`load`, which knows the data.
    """
    name = _placed(name_or_path)
    if not isinstance(name, str | Path):
        raise TypeError(f"load: a name or a path is needed, got {type(name).__name__}.")
    given = {option: value for option, value in options.items() if value is not None}
    checks: dict[str, Callable[[Any], object]] = {
        "nan_policy": lambda value: choose("nan_policy", value, NAN_POLICIES),
        "split_seed": check_seed,
        "memory_budget": budget_bytes,
        "kind": lambda value: choose("kind", value, tuple(KINDS)),
    }
    for option, check in checks.items():
        if option in given:
            check(given[option])
    file = isinstance(name, Path) or _is_path(name)
    source = "table" if is_table(name) else "npz file" if file else "set"
    if source == "set" and name not in _ENTRIES:
        guess = nearest(str(name), _ENTRIES)
        hint = f" Did you mean {guess!r}?" if guess else ""
        raise InputError(
            f"Unknown data set {name!r}.{hint} Allowed: {', '.join(_ENTRIES)}, or the path of an npz file, a table or a folder."
        )
    for option, reason in _REFUSED[source].items():
        if option in given:
            raise InputError(f"{name}: {option} {given[option]!r}: {reason}")
    if source == "set":
        info, variant = _ENTRIES[str(name)][0], given.get("variant")
        choose(f"task of {name}", given.get("task"), info.tasks)
        if variant is not None and not info.variants:
            raise InputError(f"{name} has no variants, got variant {variant!r}; leave it out.")
        choose(f"variant of {name}", variant, info.variants or ("",))


def _placed(name_or_path: Any) -> Any:
    """A path with ``~`` resolved, a name as it is. Raises InputError for what can be neither."""
    if isinstance(name_or_path, Path):
        return user_path(name_or_path)
    if isinstance(name_or_path, str) and (_is_path(name_or_path) or "\0" in name_or_path):
        found = user_path(name_or_path)
        return str(found) if name_or_path.startswith("~") else name_or_path
    return name_or_path


def why_missing(name_or_path: str) -> str | None:
    """Why a registered set cannot be loaded here, and how to get it; None where it can, and for files."""
    if _is_path(name_or_path) or find(name_or_path) is not None:
        return None
    return f"{how_to_get(name_or_path)} Origin: {_ENTRIES[name_or_path][0].source} (docs/guides/data.md)."


def _is_path(name: str) -> bool:
    return name.endswith((".npz", ".npy", *ENDINGS)) or "/" in name or "\\" in name


def is_table(path: str | Path) -> bool:
    """Whether this is the path of a table, or of a folder (whose files are tables)."""
    return str(path).endswith(ENDINGS) or (str(path) not in _ENTRIES and Path(path).is_dir())


def _load_registered(name: str, task: str | None, variant: str | None, modalities: Sequence[str] | None) -> RawDataset:
    """``task`` and ``variant`` are known to exist."""
    info, loader = _ENTRIES[name]
    task = task or info.tasks[0]
    if variant is None and info.variants:
        variant = info.variants[0]
    raw = loader(task, variant, modalities)
    origin = {"task": task, "variant": variant, "source": info.source, "licence": info.licence}
    return replace(raw, name=name, info={**raw.info, **origin, "split": "fixed"})
